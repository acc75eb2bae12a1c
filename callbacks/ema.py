"""Exponential moving average of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context, Loop, Result
from onstep.checks import whole
from onstep.trees import get_field, set_field


class EMA(Callback):
    """Exponential moving average of parameters, kept beside the state: `e = d e + (1 - d) p`.

    Compiled into the step. Starts as a copy of the parameters; averages of 16-bit floats are
    kept in 32 bits; leaves that are no floats are copied.

    Args:
        decay: d, in [0, 1); 0.999 averages over about the last 1,000 updates.
        of: the field of the state to average, `"gen.params"` for a nested one, a tuple of them,
            None for the whole state.
        warmup: with w > 0 the decay of update n (from 1) is `min(d, n / (n + w))`, so early
            averages forget the first parameters; 9 is the schedule of TensorFlow's
            `ExponentialMovingAverage(num_updates=...)`.
        start: steps during which the average is set to the parameters instead, when it is due.
        when: when the average is updated; a plain int means steps.
        name: the callback's name, needed for a second EMA only to tell them apart.

    Raises:
        ValueError: a number is out of range, or the state has no such field (at the start).
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        of: str | tuple[str, ...] | None = "params",
        warmup: int = 0,
        start: int = 0,
        when: Cadence | int = 1,
        name: str | None = None,
    ):
        if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise ValueError(f"EMA needs 0 <= decay < 1, got {decay!r}.")
        whole("EMA", "warmup", warmup, 0)
        whole("EMA", "start", start, 0)
        self.decay: float = decay
        self.of: str | tuple[str, ...] | None = of
        self.warmup: int = warmup
        self.start: int = start
        self.update_when = when
        self.name = name

    def init(self, state: Any) -> dict[str, Any]:
        carry = {"average": jax.tree.map(_wide, self._select(state))}
        return carry | {"updates": jnp.int32(0)} if self.warmup else carry

    def update(self, carry: dict[str, Any], ctx: Context) -> tuple[dict[str, Any], Context]:
        decay: Any = self.decay
        if self.warmup:
            carry = carry | {"updates": carry["updates"] + (ctx.step >= self.start)}
            n = carry["updates"].astype(jnp.float32)
            decay = jnp.minimum(decay, n / (n + self.warmup))
        if self.start:
            decay = jnp.where(ctx.step < self.start, 0.0, decay)

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return new
            return (decay * old + (1 - decay) * new.astype(old.dtype)).astype(old.dtype)

        averages = jax.tree.map(average, carry["average"], self._select(ctx.state))
        return carry | {"average": averages}, ctx

    def params(self, source: Loop | Result) -> Any:
        """The averages, like the field `of` (a tuple for several); the next step donates a loop's."""
        averages, now = source.carry(self)["average"], self._select(source.state)
        return jax.tree.map(lambda a, leaf: a if a.dtype == leaf.dtype else a.astype(leaf.dtype), averages, now)

    def apply(self, source: Loop | Result) -> Any:
        """The state with the averages in place of the parameters; the run's own is untouched."""
        averages = self.params(source)
        if self.of is None:
            return averages
        paths = (self.of,) if isinstance(self.of, str) else self.of
        state = source.state
        for path, average in zip(paths, (averages,) if isinstance(self.of, str) else averages, strict=True):
            state = set_field(state, path, average)
        return state

    def _select(self, state: Any) -> Any:
        if self.of is None:
            return state
        if isinstance(self.of, str):
            return get_field(state, self.of, "EMA")
        return tuple(get_field(state, path, "EMA") for path in self.of)


def _wide(leaf: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
