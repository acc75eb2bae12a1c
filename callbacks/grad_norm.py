"""Norms of gradients, updates and parameters, computed inside the step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.tools import get_field


@dataclass(eq=False, repr=False)
class GradNorm(Callback):
    """Logs the global L2 norm of the gradients as `grad_norm`.

    The step must return the gradients in its third result: `{"grads": grads}`. The norm is computed inside the
    compiled step, so it costs almost nothing where the optimizer clips by the same norm.

    Args:
        by_module: also log one norm for each top-level entry of the gradients, `grad_norm/<entry>`, for
            example one per network of a GAN.
        updates: also log `update_norm`, the norm of the change that the step made to the parameters.
        params: also log `param_norm`, the norm of the parameters after the step.
        of: the field of the state that holds the parameters; needed for `updates` and `params`.
        when: when norms are logged; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: the step returns no gradients, or the state has no such field (at the first step).

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, grads):
    ...     return {"params": state["params"] - 0.5 * grads}, {}, {"grads": grads}
    >>> engine = Engine(step, [GradNorm(updates=True)], log_every=1)
    >>> engine.run({"params": jnp.zeros(2)}, [jnp.array([3.0, 4.0])], epochs=1).history["train/update_norm"]
    [2.5]
    """

    _: KW_ONLY
    by_module: bool = False
    updates: bool = False
    params: bool = False
    of: str = "params"
    when: Cadence | int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        self.update_when: Cadence | int = self.when

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        if "grads" not in ctx.aux:
            raise ValueError(
                f"GradNorm needs aux['grads'], got aux with {sorted(ctx.aux)}. "
                'Return it from the step: state, metrics, {"grads": grads}.'
            )
        grads = ctx.aux["grads"]
        norms = {"grad_norm": _norm(grads)}
        if self.by_module:
            norms |= {f"grad_norm/{name}": _norm(part) for name, part in _entries(grads).items()}
        if self.updates or self.params:
            after = get_field(ctx.state, self.of, "GradNorm")
            if self.updates:
                before = get_field(ctx.before, self.of, "GradNorm")
                norms["update_norm"] = _norm(jax.tree.map(lambda new, old: new - old, after, before))
            if self.params:
                norms["param_norm"] = _norm(after)
        return carry, ctx.log(norms)


def _norm(tree: Any) -> jax.Array:
    """Return the L2 norm. The sum is computed in at least 32 bits, because 16 bits would overflow."""
    from optax.tree import norm

    return norm(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree))


def _entries(tree: Any) -> dict[str, Any]:
    """Return the leaves below each top-level entry, or below each entry of `params` if that is the only one."""
    entries: dict[str, list[Any]] = {}
    paths = jax.tree_util.tree_leaves_with_path(tree)
    depth = 1 if len({path[:1] for path, _ in paths}) == 1 and any(len(path) > 1 for path, _ in paths) else 0
    for path, leaf in paths if paths[0][0] else []:
        entries.setdefault(jax.tree_util.keystr(path[depth : depth + 1], simple=True), []).append(leaf)
    return entries
