"""Stack several batches into one tree of arrays, which one compiled call reads."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..trees import Batch


class BatchStacker:
    """Stacks batches of one kind into a tree of arrays (block size, ...).

    Each batch is copied when it is added, so its source may reuse its arrays. Rows after the last batch
    hold arbitrary values; no step reads them.

    Args:
        first: the first batch, which decides the kind.
        block_size: the size of the leading axis.

    Attributes:
        count: batches added so far.
    """

    def __init__(self, first: Batch, block_size: int):
        flat, self._structure = jax.tree.flatten(first)
        self.count: int = 0
        self._kinds, self._block_size = [_kind(leaf) for leaf in flat], block_size
        self._transferred = [isinstance(leaf, jax.Array) for leaf in flat]
        self._columns = [aligned_empty(block_size, *kind[1:3]) if kind[0] is np.ndarray else [] for kind in self._kinds]
        self.add(first)

    def add(self, batch: Batch) -> bool:
        """Add a batch and return True, or return False if it is of another kind than the first."""
        flat, structure = jax.tree.flatten(batch)
        if structure != self._structure or [_kind(leaf) for leaf in flat] != self._kinds:
            return False
        for column, leaf in zip(self._columns, flat, strict=True):
            if isinstance(column, list):
                column.append(leaf)
            else:
                column[self.count] = np.asarray(leaf)
        self.count += 1
        return True

    def batches(self) -> Batch:
        """Return the stacked arrays."""
        missing = self._block_size - self.count
        lists = {
            i: column + column[-1:] * missing for i, column in enumerate(self._columns) if isinstance(column, list)
        }
        stacked = _stack_into(tuple(_sharding(lists[i][0]) for i in lists))(lists) if lists else {}
        columns = [stacked.get(i, column) for i, column in enumerate(self._columns)]
        # Arrays that came from the device go back explicitly: `jax.transfer_guard` may forbid implicit transfers.
        pairs = zip(columns, self._transferred, strict=True)
        columns = [jax.device_put(x) if back and isinstance(x, np.ndarray) else x for x, back in pairs]
        return jax.tree.unflatten(self._structure, columns)


def aligned_empty(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an empty array (rows, *shape) that a compiled call can read in place.

    Its dtype is the one that JAX would convert to. Its address is a multiple of 64 bytes; otherwise every call
    would copy all rows.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    size = rows * math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + size].view(dtype).reshape(rows, *shape)


def last_batch(batches: Batch, count: int) -> Batch:
    """Return the last of `count` stacked batches."""
    index = jax.device_put(np.int32(count - 1))  # explicit: `jax.transfer_guard` may forbid implicit transfers
    return jax.tree.map(lambda leaf: _row(leaf, index) if isinstance(leaf, jax.Array) else leaf[count - 1], batches)


def _kind(leaf: Any) -> tuple[Any, ...]:
    """Return what the leaves of one column share. Leaves already in host memory count as numpy arrays."""
    if isinstance(leaf, jax.Array):
        on_host = [device.platform for device in leaf.sharding.device_set] == ["cpu"]
        weak = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.weak_type  # numpy has neither
        return np.ndarray if on_host and not weak else jax.Array, leaf.shape, leaf.dtype, weak, _sharding(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.ndarray, leaf.shape, leaf.dtype, False
    return (type(leaf),)  # a Python number, whose type is weak


@jax.jit
def _row(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Return how the leaf is divided over devices, or None if it is on one."""
    sharding = getattr(leaf, "sharding", None)
    several = isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1
    return sharding if several else None


@functools.lru_cache(maxsize=64)
def _stack_into(shardings: tuple[NamedSharding | None, ...]) -> Any:
    """Return a function that stacks columns of leaves, each divided as its leaves are."""
    there = [s and NamedSharding(s.mesh, PartitionSpec(None, *s.spec)) for s in shardings]

    def stack(columns: dict[int, list[Any]]) -> dict[int, jax.Array]:
        pairs = zip(columns.items(), there, strict=True)
        stacked = {i: (jnp.stack(leaves), sharding) for (i, leaves), sharding in pairs}
        constrain = jax.lax.with_sharding_constraint
        return {
            i: array if sharding is None else constrain(array, sharding) for i, (array, sharding) in stacked.items()
        }

    return jax.jit(stack)
