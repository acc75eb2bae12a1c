"""Exponential moving average of parameters."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context, Loop, Result
from onstep.tools import cast_like, check_int, get_carry, get_fields, map_floats, set_fields, widen


class EmaCarry(NamedTuple):
    """What `EMA` keeps on the device."""

    average: Any  # a tree like the averaged fields, with 16-bit floats as float32


class EmaWarmupCarry(NamedTuple):
    """What `EMA` with a warm-up keeps on the device."""

    # Not one type with `updates=None`, because Orbax would expect an entry for it in the checkpoints of version 0.1.
    average: Any  # as above
    updates: jax.Array  # int32 scalar, the number of updates since `start`


@dataclass(eq=False, repr=False)
class EMA(Callback):
    """Keeps an exponential moving average of the parameters: `e = d e + (1 - d) p`.

    Evaluate, or export, the average instead of the parameters of the last step: it is less noisy, and often
    better. It is computed inside the compiled step and starts as a copy of the parameters. 16-bit floats are
    averaged in 32 bits. Leaves that are not floats are copied.

    Args:
        decay: d, in [0, 1); 0.999 averages over about the last 1,000 updates.
        of: the field of the state to average, `"gen.params"` or `"0.params"` for a nested one; an index; a tuple
            of fields; or None for the whole state.
        warmup: with w > 0, update n (from 1) uses the decay `min(d, n / (n + w))`, so that the average soon
            forgets the first parameters; 9 is the schedule of TensorFlow's
            `ExponentialMovingAverage(num_updates=...)`.
        start: during the first `start` steps, each due update copies the parameters instead.
        when: when the average is updated; a plain int means steps.
        name: the callback's name, needed only to tell two EMAs apart.

    Raises:
        ValueError: a number is out of range, or the state has no such field (when the run begins).

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {"params": state["params"] + batch}, {}
    >>> ema = EMA(0.5)
    >>> result = Engine(step, [ema]).run({"params": jnp.float32(0)}, [2.0, 2.0], epochs=1)
    >>> float(result.state["params"]), float(ema.params(result))
    (4.0, 2.5)
    """

    decay: float = 0.999
    _: KW_ONLY
    of: str | int | tuple[str | int, ...] | None = "params"
    warmup: int = 0
    start: int = 0
    when: Cadence | int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.decay, (int, float)) and 0 <= self.decay < 1):
            raise ValueError(f"EMA needs 0 <= decay < 1, got {self.decay!r}.")
        check_int("EMA", "warmup", self.warmup, 0)
        check_int("EMA", "start", self.start, 0)
        self.update_when: Cadence | int = self.when

    def init(self, state: Any) -> EmaCarry | EmaWarmupCarry:
        average = jax.tree.map(widen, get_fields(state, self.of, "EMA"))
        return EmaWarmupCarry(average, jnp.int32(0)) if self.warmup else EmaCarry(average)

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        decay: Any = self.decay
        if self.warmup:
            carry = carry._replace(updates=carry.updates + (ctx.step >= self.start).astype(jnp.int32))
            n = carry.updates.astype(float)  # float64 if JAX has it enabled
            decay = jnp.minimum(decay, n / (n + self.warmup))
        if self.start:
            decay = jnp.where(ctx.step < self.start, 0.0, decay)
        shares = decay, 1 - decay

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            keep, take = (share.astype(old.dtype) if isinstance(share, jax.Array) else share for share in shares)
            return keep * old + take * new

        now = get_fields(ctx.state, self.of, "EMA")
        return carry._replace(average=map_floats(mean, carry.average, now)), ctx

    def params(self, source: Loop | Result) -> Any:
        """Return the averages, in the structure and dtypes of the field `of`; a tuple for several fields.

        The next step donates the arrays of a loop, so copy anything you need after the event.
        """
        return cast_like(get_carry(source, self).average, get_fields(source.state, self.of, "EMA"))

    def apply(self, source: Loop | Result) -> Any:
        """Return the state with the averages in place of the parameters; the run's own state is unchanged."""
        averages = self.params(source)  # first, because it checks the source
        return set_fields(source.state, self.of, averages)
