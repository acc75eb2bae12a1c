"""Stochastic weight averaging."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context, Loop, Result, every
from onstep.tools import cast_like, check_int, get_carry, get_fields, map_floats, set_fields, to_host, widen


class SwaCarry(NamedTuple):
    """What `SWA` keeps on the device."""

    average: Any  # a tree like the averaged field, with 16-bit floats as float32
    # Named by version 0.1; it shadows tuple.count.
    count: jax.Array  # type: ignore[assignment]  # int32 scalar, the number of points averaged so far


@dataclass(eq=False, repr=False)
class SWA(Callback):
    """Keeps the mean of the weights at regular points of the training, from step `start` on.

    Use it with a cyclical or constant learning rate, once training has settled: the mean of such weights often
    generalizes better than any of them. Every point counts the same, `a = (1 - 1/n) a + (1/n) w` for the n-th
    (Izmailov et al., 2018, arXiv:1803.05407). The mean is computed inside the compiled step. 16-bit floats are
    averaged in 32 bits. Leaves that are not floats are copied from the last point. Batch statistics do not fit
    averaged weights, so compute them again with a pass of `apply(result)` over the training data.

    Args:
        start: the first step whose weights may count. Steps are counted from 1, so 0 means the same as 1.
        of: the field of the state to average, `"gen.params"` or `"0.params"` for a nested one; an index; a tuple
            of fields; or None for the whole state.
        when: at which steps weights are added to the mean; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `start` is not a whole number >= 0, or the state has no such field (when the run begins).

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {"params": state["params"] + batch}, {}
    >>> swa = SWA(start=2, when=1)
    >>> result = Engine(step, [swa]).run({"params": jnp.float32(0)}, [1.0, 1.0, 1.0], epochs=1)
    >>> float(result.state["params"]), float(swa.params(result))
    (3.0, 2.5)
    """

    _: KW_ONLY
    start: int
    of: str | int | tuple[str | int, ...] | None = "params"
    when: Cadence | int = every(epochs=1)  # noqa: RUF009 (frozen)
    name: str | None = None

    def __post_init__(self) -> None:
        check_int("SWA", "start", self.start, 0)
        self.update_when: Cadence | int = self.when

    def init(self, state: Any) -> SwaCarry:
        return SwaCarry(jax.tree.map(widen, get_fields(state, self.of, "SWA")), jnp.int32(0))

    def update(self, carry: SwaCarry, ctx: Context) -> tuple[SwaCarry, Context]:
        counts = ctx.step + 1 >= self.start
        n = carry.count + counts.astype(jnp.int32)

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            share = (1 / n.astype(float)).astype(old.dtype)
            return jnp.where(counts, (1 - share) * old + share * new, old)

        return SwaCarry(map_floats(mean, carry.average, get_fields(ctx.state, self.of, "SWA")), n), ctx

    def params(self, source: Loop | Result) -> Any:
        """Return the mean, in the structure and dtypes of the field `of`; before the first point, the weights.

        Waits for the device.
        """
        carry, now = get_carry(source, self), get_fields(source.state, self.of, "SWA")
        return cast_like(carry.average, now) if to_host(carry.count) else now

    def apply(self, source: Loop | Result) -> Any:
        """Return the state with the mean in place of the weights; the run's own state is unchanged."""
        averages = self.params(source)  # first, because it checks the source
        return set_fields(source.state, self.of, averages)
