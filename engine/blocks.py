"""Several steps in one compiled call: how many, and their batches as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .trees import Batch

MOST = 128
"""Steps in a block: more gain nothing, whatever the step."""
FLOPS = 4e9
"""Of a block, about 0.1 s on two cores: nobody waits for long."""
BYTES = 2**25
"""Of a block's batches."""


def choose(jaxpr: Any, batch: Batch) -> int:
    """The most steps a call for a step, 0 for one by one: by the program and the backend alone.

    On CPUs a block saves the dispatch of all steps but one; but XLA runs a convolution in a loop up to 25
    times slower. Elsewhere blocks have not been measured. What a step does besides, such as a print, stays
    step by step.

    Args:
        jaxpr: of one step.
        batch: one batch.
    """
    equations = list(_equations(jaxpr, 1))
    slow = any(e.primitive.name == "conv_general_dilated" for e, _ in equations)
    if slow or jaxpr.effects or jax.default_backend() != "cpu":
        return 0
    flops = sum(times * _flops(e) for e, times in equations if e.primitive.name == "dot_general")
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(batch))
    rows = int(min(MOST, FLOPS // max(flops, 1), BYTES // max(size, 1)))
    return rows if rows > 1 else 0


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """Every equation, and how often it is run at least."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from _equations(part, inner)


def _flops(dot: Any) -> int:
    ((contracted, _), _), left = dot.params["dimension_numbers"], dot.invars[0].aval.shape
    return 2 * math.prod(dot.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def several(one: Any, rows: int, bundle: Any, batches: Batch, rng: Any, due: Any) -> tuple[Any, Any]:
    """Several steps, to be compiled: one executable for every number of them.

    Args:
        one: the compiled call of one step.
        rows: the most steps.
        bundle: what the first step takes.
        batches: stacked, (rows, ...).
        rng: the run's random key.
        due: for each step which halves are due, (rows, halves); and the number of steps.

    Returns:
        The bundle that the last step gives; its metrics, and beside them a column (rows,) of each.
    """
    mask, count = due

    def row(i: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (batches, mask))

    def body(i: Any, carry: Any) -> Any:
        bundle, columns = carry
        batch, now = row(i)
        bundle, metrics = one(bundle, batch, rng, now)
        return bundle, jax.tree.map(lambda c, m: jax.lax.dynamic_update_index_in_dim(c, m, i, 0), columns, metrics)

    batch, now = jax.eval_shape(row, 0)
    shapes = jax.eval_shape(one, bundle, batch, rng, now)[1]
    columns = jax.tree.map(lambda m: jnp.zeros((rows, *m.shape), m.dtype), shapes)
    bundle, columns = jax.lax.fori_loop(0, count, body, (bundle, columns))
    last = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, count - 1, keepdims=False), columns)
    return bundle, (last, columns)


def stack(batches: list[Batch], rows: int) -> tuple[Batch, int]:
    """The first batches, as far as they are alike, as one tree of arrays (rows, ...); and how many they are.

    The rows beyond hold anything: no step reads them.
    """
    first, structure = jax.tree.flatten(batches[0])
    kinds, columns = [_kind(leaf) for leaf in first], [first]
    for batch in batches[1:]:
        flat, other = jax.tree.flatten(batch)
        if other != structure or [_kind(leaf) for leaf in flat] != kinds:
            break
        columns.append(flat)
    count = len(columns)
    if any(isinstance(leaf, jax.Array) and not _on_host(leaf) for leaf in first):
        stacked = _stacked(columns + columns[-1:] * (rows - count))
    else:
        stacked = [aligned(rows, *kind) for kind in kinds]
        for out, *column in zip(stacked, *columns, strict=True):
            np.stack(column, out=out[:count], casting="unsafe")
    return jax.tree.unflatten(structure, stacked), count


def aligned(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array (rows, *shape) in the compiled call's own type, which the call can read where it lies."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    size = rows * math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64  # bytes; from elsewhere every call would copy all rows
    return raw[start : start + size].view(dtype).reshape(rows, *shape)


def last(batches: Batch, count: int) -> Batch:
    """The last of the `count` batches that were stacked."""
    return jax.tree.map(lambda leaf: leaf[count - 1], batches)


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return leaf.shape, leaf.dtype


def _on_host(leaf: jax.Array) -> bool:
    """Whether reading it is free; random keys cannot be read."""
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return on_cpu and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@jax.jit
def _stacked(columns: list[list[jax.Array]]) -> list[jax.Array]:
    return [jnp.stack(leaves) for leaves in zip(*columns, strict=True)]
