"""Norms of gradients, updates and parameters, computed inside the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.trees import get_field


class GradNorm(Callback):
    """Logs the global L2 norm of `aux["grads"]` as `grad_norm`.

    Compiled into the step, so it costs next to nothing where the optimizer computes the same
    norm to clip by it. The step returns the gradients as its third result: `{"grads": grads}`.

    Args:
        by_module: also one norm per top-level entry of the gradients, `grad_norm/<entry>`; so
            also one per network of a GAN.
        updates: also `update_norm`, of the change that the step made to the parameters.
        params: also `param_norm`.
        of: the field of the state that holds the parameters; for `updates` and `params`.
        when: when norms are logged; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: the step returns no gradients (at the first step).
    """

    def __init__(
        self,
        *,
        by_module: bool = False,
        updates: bool = False,
        params: bool = False,
        of: str = "params",
        when: Cadence | int = 1,
        name: str | None = None,
    ):
        self.by_module: bool = by_module
        self.updates: bool = updates
        self.params: bool = params
        self.of: str = of
        self.update_when = when
        self.name = name

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
    """The L2 norm; summed in 32 bits at least, where 16 would overflow."""
    from optax.tree import norm

    return norm(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree))


def _entries(tree: Any) -> dict[str, Any]:
    """The leaves below each top-level entry; below `params` alone where that is the only one."""
    entries: dict[str, list[Any]] = {}
    paths = jax.tree_util.tree_leaves_with_path(tree)
    depth = 1 if len({path[:1] for path, _ in paths}) == 1 and any(len(path) > 1 for path, _ in paths) else 0
    for path, leaf in paths if paths[0][0] else []:
        entries.setdefault(jax.tree_util.keystr(path[depth : depth + 1], simple=True), []).append(leaf)
    return entries
