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
    >>> print_two = Fingerprint(when=2)
    >>> for data in ([1, 2, 3, 4], [1, 2, 3, 5]):
    ...     _ = Engine(lambda state, batch: (state + batch, {}), [print_two]).run(jnp.int32(0), data, epochs=1)
    ...     print([int(value) for value in print_two.get_state()["batch"]])
    [4261281274, 4227595258]
    [4261281274, 4219173754]
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

    Each word of 32 bits is multiplied by an odd number that depends on its position, and the products are added
    modulo 2^32. An odd factor is invertible, so a change of one word always changes the sum.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = _words(leaf)
        factors = 2 * _mix(jax.lax.iota(jnp.uint32, words.size) + jnp.uint32(0x9E3779B9 * (number + 1) % 2**32)) + 1
        total += (words * factors).sum(dtype=jnp.uint32)
    return total


def _words(leaf: Any) -> jax.Array:
    """Return the bits of an array as words of 32 bits; those of smaller types are widened."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize < 4:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return leaf.astype(jnp.uint32).ravel()
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()


def _mix(x: jax.Array) -> jax.Array:
    """Return a well-mixed word for each word, as in MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
