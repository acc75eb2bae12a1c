"""Run steps twice and compare the results, to detect a device that computes wrongly."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Loop, every, processes
from onstep.tools import named_leaves, to_host


class RepeatStep(Callback):
    """Runs a step twice on copies and compares every bit of the results.

    A device with a fault may compute wrong numbers without an error: silent data corruption (Dixit et al., 2021,
    "Silent Data Corruptions at Scale"). The two calls use the executable of the run, so they must give the same bits.
    If they do not, the device is faulty, or the step is not deterministic on it, and then a resumed run does not end in
    the same bytes either.

    Each device compares what it holds. If a difference is found on one of them, all processes raise the error.

    Args:
        when: at which steps to compare; a plain int means steps. A comparison takes the time of two steps, and memory
            for two more copies of the state and the carries.
        name: the callback's name.

    Raises:
        RuntimeError: the results differ; the message names the step, the leaves and the devices.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": state}), [RepeatStep(when=2)])
    >>> engine.run(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1).step
    3
    """

    def __init__(self, when: Cadence | int = every(1000), *, name: str | None = None):  # noqa: B008 (frozen)
        self.when: Cadence | int = when
        self.name: str | None = name

    def on_step_begin(self, loop: Loop) -> None:
        results = (dict(zip(("state", "carries", "metrics"), loop.try_step(), strict=True)) for _ in range(2))
        first, second = map(_by_device, results)
        counts = {device: _count_differing(parts, second[device]) for device, parts in first.items()}
        found = [
            f"{name} ({count} of {first[device][name].size}) on {device.platform}:{device.id}"
            for device, each in counts.items()
            for name, count in zip(sorted(first[device]), to_host(each).tolist(), strict=True)
            if count
        ]
        if where := ", ".join(itertools.chain(*processes.agree(found))):
            raise RuntimeError(
                f"RepeatStep: two calls of step {loop.step + 1} with the same arguments differ in {where}. The device "
                "computes wrongly, or the step is not deterministic on it. Run it on another device."
            )


def _by_device(tree: Any) -> dict[Any, dict[str, jax.Array]]:
    """Return what each device of this process holds of a tree, by the name of the leaf."""
    found: dict[Any, dict[str, jax.Array]] = {}
    for name, leaf in named_leaves(tree).items():
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for shard in (jax.random.key_data(leaf) if typed else leaf).addressable_shards:
            found.setdefault(shard.device, {})[name] = shard.data
    return found


@jax.jit
def _count_differing(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> jax.Array:
    """Return how many numbers of two arrays differ in a bit, for each name in ascending order: int32, (names,)."""
    return jnp.stack([(_bits(one[name]) != _bits(other[name])).sum(dtype=jnp.int32) for name in sorted(one)])


def _bits(array: jax.Array) -> jax.Array:
    """Return numbers as integers with the same bits, so that a NaN is equal to itself."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if jnp.issubdtype(array.dtype, jnp.inexact):
        array = jax.lax.bitcast_convert_type(array, f"uint{jnp.finfo(array.dtype).bits}")
    return array
