"""Fingerprints of the state and of the batches, to find the step at which two runs differ first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Context, Loop, every
from onstep.tools import get_carry, to_host


class Fingerprint(Callback):
    """Records hashes of the state and of the batch, so that `onstep diff` finds the first step at which runs differ.

    The hashes are computed inside the compiled step, and kept with the checkpoints of the run. A change of a single
    bit of one number always changes a hash. Use it when two runs should be equal and are not.

    Args:
        when: when to record; a plain int means steps.
        name: the callback's name.

    >>> from onstep import Engine
    >>> every_second = Fingerprint(when=2)
    >>> for data in ([1, 2, 3, 4], [1, 2, 3, 5]):
    ...     _ = Engine(lambda state, batch: (state + batch, {}), [every_second]).run(jnp.int32(0), data, epochs=1)
    ...     print([int(value) for value in every_second.get_state()["batch"]])
    [3609039597, 3518448300]
    [3609039597, 3356814234]
    """

    def __init__(self, when: Cadence | int = every(50), *, name: str | None = None):  # noqa: B008 (frozen)
        self.when: Cadence | int = when
        self.update_when: Cadence | int = when
        self.name: str | None = name
        self.set_state({"fingerprint_steps": [], "state": [], "batch": []})

    def init(self, state: Any) -> jax.Array:
        return jnp.zeros(2, jnp.uint32)

    def update(self, carry: jax.Array, ctx: Context) -> tuple[jax.Array, Context]:
        return jnp.stack([_hash(ctx.batch), _hash(ctx.state)]), ctx

    def on_step_end(self, loop: Loop) -> None:
        batch, state = to_host(get_carry(loop, self)).tolist()
        for kept, value in zip((self._steps, self._batch, self._state), (loop.step, batch, state), strict=True):
            kept.append(value)

    def get_state(self) -> dict[str, Any]:
        hashes = {"batch": np.array(self._batch, np.uint32), "state": np.array(self._state, np.uint32)}
        return {"fingerprint_steps": np.array(self._steps, np.int64), **hashes}

    def set_state(self, state: dict[str, Any]) -> None:
        self._steps: list[int] = np.asarray(state["fingerprint_steps"], np.int64).tolist()
        self._batch: list[int] = np.asarray(state["batch"], np.uint32).tolist()
        self._state: list[int] = np.asarray(state["state"], np.uint32).tolist()


def _hash(tree: Any) -> jax.Array:
    """Return a hash of all leaves of a tree: a uint32 scalar.

    Each word of 32 bits is combined with its position and mixed, and the results are added modulo 2^32. Mixing maps
    different words to different ones, so a change of one word always changes the sum. Changes of several words cancel
    with a probability of 2^-32. Without the mixing, two changed signs would always cancel.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree), 1):
        words = _words(leaf)
        total += _mix(words ^ _positions(number, words.shape)).sum(dtype=jnp.uint32)
    return total


def _positions(number: int, shape: tuple[int, ...]) -> jax.Array:
    """Return a word for each position in a leaf, from the number of the leaf.

    It is computed along each axis, as the index in a flat array would gather a leaf that is divided over devices.
    """
    positions, stride = jnp.full(shape, np.uint32(number * 0x85EBCA6B % 2**32)), 0x9E3779B9
    for axis in reversed(range(len(shape))):
        positions += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride = stride * shape[axis] % 2**32
    return positions


def _words(leaf: Any) -> jax.Array:
    """Return the bits of an array as words of 32 bits; smaller types are widened, and larger ones get another axis."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize < 4:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Return a well-mixed word for each word, a different one for each, as in MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
