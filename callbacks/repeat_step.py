"""Run steps twice and compare the results, to detect a device that computes wrongly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Loop, every
from onstep.tools import named_leaves, to_host


class RepeatStep(Callback):
    """Runs a step twice on copies and compares every bit of the results.

    A device with a fault may compute wrong numbers without an error: silent data corruption (Dixit et al., 2021,
    "Silent Data Corruptions at Scale"). The two calls use the executable of the run, so they must give the same bits.
    If they do not, the device is faulty, or the step is not deterministic on it, and then a resumed run does not end in
    the same bytes either.

    Args:
        when: at which steps to compare; a plain int means steps. Each comparison costs two steps and three copies of
            the state.
        name: the callback's name.

    Raises:
        RuntimeError: the results differ; the message names the step and the leaves.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": state}), [RepeatStep(when=2)])
    >>> engine.run(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1).step
    3
    """

    def __init__(self, when: Cadence | int = every(1000), *, name: str | None = None):  # noqa: B008 (frozen)
        self.when: Cadence | int = when
        self.name: str | None = name

    def on_step_begin(self, loop: Loop) -> None:
        first, second = (dict(zip(("state", "carries", "metrics"), loop.try_step(), strict=True)) for _ in range(2))
        pairs = {name: (leaf, named_leaves(second)[name]) for name, leaf in named_leaves(first).items()}
        counts = {name: _differing(*pair) for name, pair in pairs.items()}
        bad = {name: int(to_host(count)) for name, count in counts.items() if int(to_host(count))}
        if bad:
            where = ", ".join(f"{name} ({count} of {pairs[name][0].size})" for name, count in bad.items())
            raise RuntimeError(
                f"RepeatStep: two calls of step {loop.step + 1} with the same arguments differ in {where}. The device "
                "computes wrongly, or the step is not deterministic on it. Run it on another device."
            )


@jax.jit
def _differing(one: Any, other: Any) -> jax.Array:
    """Return how many numbers of two arrays differ in a bit: an int32 scalar."""
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    if jnp.iscomplexobj(one):
        one, other = (jnp.stack([x.real, x.imag]) for x in (one, other))
    if jnp.issubdtype(one.dtype, jnp.inexact):
        kind = f"uint{8 * one.dtype.itemsize}"
        one, other = (jax.lax.bitcast_convert_type(x, kind) for x in (one, other))
    return (one != other).sum(dtype=jnp.int32)
