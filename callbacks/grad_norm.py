"""Norms of gradients, updates and parameters, computed inside the step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.tools import get_fields, leaves_of_type, signature, widen


@dataclass(eq=False, repr=False)
class GradNorm(Callback):
    """Logs the global L2 norm of the gradients as `grad_norm`.

    The step must return the gradients in its third result: `{"grads": grads}`. The norm is computed inside the
    compiled step, so it costs almost nothing where the optimizer clips by the same norm. Leaves that are not floats
    are left out.

    Args:
        by_module: also log one norm for each top-level entry of the gradients that has floats,
            `grad_norm/<entry>`, for example one per network of a GAN.
        updates: also log `update_norm`, the norm of the change that the step made to the parameters.
        params: also log `param_norm`, the norm of the parameters after the step.
        of: the field of the state that holds the parameters, needed for `updates` and `params`: `"gen.params"` or
            `"0.params"` for a nested one; an index; a tuple of fields; or None for the whole state.
        when: when norms are logged; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: the state has no such field, or no floats in it (when the run begins); or the step returns no
            gradients (at the first step).

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
    of: str | int | tuple[str | int, ...] | None = "params"
    when: Cadence | int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        self.update_when: Cadence | int = self.when

    def init(self, state: Any) -> tuple[()]:
        if self.updates or self.params:
            _floats(get_fields(state, self.of, "GradNorm"), repr(self.of))
        return ()

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        if "grads" not in ctx.aux:
            raise ValueError(
                f"GradNorm needs aux['grads'], got aux with {sorted(ctx.aux)}. "
                'Return it from the step: state, metrics, {"grads": grads}.'
            )
        grads = _floats(ctx.aux["grads"], "aux['grads']")
        norms = {"grad_norm": _norm(grads)}
        if self.by_module:
            norms |= {f"grad_norm/{name}": _norm(part) for name, part in _entries(ctx.aux["grads"]).items()}
        if self.updates or self.params:
            before, after = (
                _floats(get_fields(state, self.of, "GradNorm"), repr(self.of)) for state in (ctx.before, ctx.state)
            )
            if self.updates:
                norms["update_norm"] = _norm([new - old for new, old in zip(after, before, strict=True)])
            if self.params:
                norms["param_norm"] = _norm(after)
        return carry, ctx.log(norms)


def _floats(tree: Any, what: str) -> list[jax.Array]:
    """Return the leaves that are floats, in at least 32 bits, because the sum of squares in 16 bits would overflow.

    Other leaves, such as counters, random keys and the float0 gradients of integers, have no norm.

    Raises:
        ValueError: there are none; the message shows the tree.
    """
    floats = leaves_of_type(tree, jnp.inexact)
    if not floats:
        raise ValueError(f"GradNorm needs floats in {what}, got {signature(tree) or tree}.")
    return [widen(leaf) for leaf in floats.values()]


def _norm(floats: list[jax.Array]) -> jax.Array:
    """Return the L2 norm, by the sum that Optax also makes, so that XLA computes it once."""
    from optax.tree import norm

    return norm(floats)


def _entries(tree: Any) -> dict[str, list[jax.Array]]:
    """Return the floats below each top-level entry, or below each entry of `params` if that is the only one."""
    entries: dict[str, list[jax.Array]] = {}
    paths = jax.tree_util.tree_leaves_with_path(tree)
    depth = 1 if len({path[:1] for path, _ in paths}) == 1 and any(len(path) > 1 for path, _ in paths) else 0
    for path, leaf in paths:
        if path and leaves_of_type(leaf, jnp.inexact):
            name = jax.tree_util.keystr(path[depth : depth + 1], simple=True)
            entries.setdefault(name, []).append(widen(leaf))
    return entries
