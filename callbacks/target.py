"""Target networks and mean teachers: weights in the state that follow others."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
from onstep import Cadence, Callback, Context
from onstep.tools import difference, get_field, map_floats, set_field, widen


@dataclass(eq=False, repr=False)
class Target(Callback):
    """Moves one field of the state towards another: `t = (1 - rate) t + rate s`.

    Use it for weights that the step itself reads: the target networks of DQN and DDPG (Lillicrap et al., 2015,
    arXiv:1509.02971), or a mean teacher (Tarvainen and Valpola, 2017, arXiv:1703.01780). For an average that is
    only evaluated, use `EMA`. The move is computed inside the compiled step. Leaves that are not floats are
    copied. Keep the target of 16-bit weights in 32 bits, because a small move is lost to rounding in 16.

    Args:
        source: the field of the state to follow, `"critic.params"` or `"0.params"` for a nested one; or an index.
        target: the field that follows; it starts with its value in the first state.
        rate: in (0, 1]; 1 is a hard copy, as in DQN: `Target(rate=1, when=1000)`.
        when: when the target moves; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `rate` is out of range; or the state has no such field, or the two fields differ in more
            than the width of their floats (when the run begins).

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {**state, "params": state["params"] + batch}, {}
    >>> state = {"params": jnp.float32(0), "target": jnp.float32(0)}
    >>> result = Engine(step, [Target(rate=0.5)]).run(state, [8.0, 8.0], epochs=1)
    >>> float(result.state["params"]), float(result.state["target"])
    (16.0, 10.0)
    """

    source: str | int = "params"
    target: str | int = "target"
    _: KW_ONLY
    rate: float = 0.005
    when: Cadence | int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.rate, (int, float)) and 0 < self.rate <= 1):
            raise ValueError(f"Target needs 0 < rate <= 1, got {self.rate!r}.")
        if self.source == self.target:
            raise ValueError(f"Target needs two different fields, got {self.source!r} for both.")
        self.update_when: Cadence | int = self.when

    def init(self, state: Any) -> tuple[()]:
        source, target = self._fields(state)
        if difference(jax.tree.map(widen, source), jax.tree.map(widen, target)):
            raise ValueError(
                f"Target needs {self.target!r} to have the structure and shapes of {self.source!r}, but from "
                f"{self.source!r} to {self.target!r}, {difference(source, target)}."
            )
        return ()

    def update(self, carry: tuple[()], ctx: Context) -> tuple[tuple[()], Context]:
        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            # Not (1 - 1) * old + new, which would keep a NaN or inf.
            return new if self.rate == 1 else (1 - self.rate) * old + self.rate * new

        source, target = self._fields(ctx.state)
        return carry, ctx.replace(state=set_field(ctx.state, self.target, map_floats(move, target, source)))

    def _fields(self, state: Any) -> tuple[Any, Any]:
        return get_field(state, self.source, "Target"), get_field(state, self.target, "Target")
