"""Target networks and mean teachers: weights in the state that follow others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.trees import difference, get_field, set_field


class Target(Callback):
    """Moves one field of the state towards another: `t = (1 - rate) t + rate s`.

    For weights that the step itself reads: the target networks of DQN and DDPG (Lillicrap et al.,
    2015), the mean teacher (Tarvainen and Valpola, 2017). An average that only evaluation looks at
    is EMA's business. Compiled into the step. Leaves that are no floats are copied. Keep the target
    of 16-bit weights in 32 bits: in 16 a small move rounds to none.

    Args:
        source: the field of the state that is followed, `"critic.params"` for a nested one.
        target: the field that follows; it starts as it is in the first state.
        rate: in (0, 1]; 1 is a hard copy, as in DQN: `Target(rate=1, when=1000)`.
        when: when the target moves; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `rate` is out of range; or the state has no such field, or the two differ in
            more than the width of their floats (at the start).
    """

    def __init__(
        self,
        source: str = "params",
        target: str = "target",
        *,
        rate: float = 0.005,
        when: Cadence | int = 1,
        name: str | None = None,
    ):
        if not (isinstance(rate, (int, float)) and 0 < rate <= 1):
            raise ValueError(f"Target needs 0 < rate <= 1, got {rate!r}.")
        self.source: str = source
        self.target: str = target
        self.rate: float = rate
        self.update_when: Cadence | int = when
        self.name: str | None = name

    def init(self, state: Any) -> tuple[()]:
        source, target = self._fields(state)
        if difference(jax.tree.map(_wide, source), jax.tree.map(_wide, target)):
            raise ValueError(
                f"Target needs {self.target!r} like {self.source!r}, but from {self.source!r} to {self.target!r} "
                f"{difference(source, target)}."
            )
        return ()

    def update(self, carry: tuple[()], ctx: Context) -> tuple[tuple[()], Context]:
        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return new
            new = new.astype(old.dtype)
            return new if self.rate == 1 else (1 - self.rate) * old + self.rate * new

        source, target = self._fields(ctx.state)
        return carry, ctx.replace(state=set_field(ctx.state, self.target, jax.tree.map(move, target, source)))

    def _fields(self, state: Any) -> tuple[Any, Any]:
        return get_field(state, self.source, "Target"), get_field(state, self.target, "Target")


def _wide(leaf: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
