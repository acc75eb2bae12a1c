"""Stochastic weight averaging."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context, Loop, Result, every
from onstep.checks import whole
from onstep.trees import get_field, set_field


class SWA(Callback):
    """Stochastic weight averaging: the mean of the weights at the due points from step `start` on.

    Each counts the same: `a = (1 - 1/n) a + (1/n) w` for the n-th (Izmailov et al., 2018,
    arXiv:1803.05407). Meant for a cyclical or constant learning rate, once training has settled.
    Compiled into the step. Averages of 16-bit floats are kept in 32 bits; leaves that are no
    floats are those of the last point. Batch statistics do not fit averaged weights: run the
    training data once through a forward pass of `apply(result)` that renews them.

    Args:
        start: the first step at which weights are counted, if it is due.
        of: the field of the state to average, `"gen.params"` for a nested one, None for the whole state.
        when: when weights are counted; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `start` is no whole number >= 0, or the state has no such field (at the start).
    """

    def __init__(
        self,
        *,
        start: int,
        of: str | None = "params",
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        name: str | None = None,
    ):
        self.start: int = whole("SWA", "start", start, 0)
        self.of: str | None = of
        self.update_when: Cadence | int = when
        self.name: str | None = name

    def init(self, state: Any) -> dict[str, Any]:
        return {"average": jax.tree.map(_wide, self._select(state)), "count": jnp.int32(0)}

    def update(self, carry: dict[str, Any], ctx: Context) -> tuple[dict[str, Any], Context]:
        counts = ctx.step + 1 >= self.start
        n = carry["count"] + counts

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return new
            share = (1 / n).astype(old.dtype)
            return jnp.where(counts, (1 - share) * old + share * new.astype(old.dtype), old)

        return {"average": jax.tree.map(mean, carry["average"], self._select(ctx.state)), "count": n}, ctx

    def params(self, source: Loop | Result) -> Any:
        """The averages, like the field `of`; the present weights as long as none are counted."""
        carry, now = source.carry(self), self._select(source.state)
        if not int(carry["count"]):
            return now
        return jax.tree.map(lambda a, leaf: a if a.dtype == leaf.dtype else a.astype(leaf.dtype), carry["average"], now)

    def apply(self, source: Loop | Result) -> Any:
        """The state with the averages in place of the weights; the run's own is untouched."""
        averages = self.params(source)
        return averages if self.of is None else set_field(source.state, self.of, averages)

    def _select(self, state: Any) -> Any:
        return state if self.of is None else get_field(state, self.of, "SWA")


def _wide(leaf: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
