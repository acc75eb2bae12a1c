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
    """The most steps a call for a step, 0 for one by one: by the program and the backend alone."""
    return decide(jaxpr, batch)[0]


def decide(jaxpr: Any, batch: Batch) -> tuple[int, str]:
    """What `choose` gives, and why.

    On CPUs a block saves the dispatch of all steps but one; but XLA runs a convolution in a loop up to 25
    times slower. Elsewhere blocks have not been measured. What a step does besides, such as a print, stays
    step by step.

    Args:
        jaxpr: of one step.
        batch: one batch.
    """
    config: Any = jax.config
    if jax.default_backend() != "cpu":
        return 0, "several steps in a call are not measured on accelerators"
    if jaxpr.effects:
        return 0, "what a step does besides, such as a print, stays step by step"
    if config.jax_debug_nans or config.jax_debug_infs:
        return 0, "jax_debug_nans and jax_debug_infs look at a step by itself"
    if any(e.primitive.name == "conv_general_dilated" for e, _ in equations(jaxpr, 1)):
        return 0, "a convolution is slower in a loop on CPUs"
    work = sum(times * flops(e) for e, times in equations(jaxpr, 1) if e.primitive.name == "dot_general")
    size = sum(getattr(leaf, "nbytes", 4) for leaf in jax.tree.leaves(batch))
    rows, why = min(
        (MOST, "more gain nothing"),
        (int(FLOPS // max(work, 1)), "more would be too long a call to wait for"),
        (BYTES // max(size, 1), "more batches would take too much memory at once"),
    )
    return (rows, why) if rows > 1 else (0, why)


def equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """Every equation, and how often it is run at least."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from equations(part, inner)


def flops(dot: Any) -> int:
    """Of one `dot_general`."""
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


class Stack:
    """Batches that are alike as one tree of arrays (rows, ...).

    Each is copied when it is added, so that its source may fill the same arrays again. The rows
    beyond the last one hold anything: no step reads them.

    Attributes:
        count: batches in it.
    """

    def __init__(self, first: Batch, rows: int):
        flat, self._structure = jax.tree.flatten(first)
        self.count: int = 0
        self._kinds, self._rows = [_kind(leaf) for leaf in flat], rows
        self._columns = [aligned(rows, *kind[1:3]) if kind[0] is np.ndarray else [] for kind in self._kinds]
        self.add(first)

    def add(self, batch: Batch) -> bool:
        """Adds a batch, unless it is of another kind than the first."""
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
        """The tree of arrays."""
        missing = self._rows - self.count
        lists = {
            i: column + column[-1:] * missing for i, column in enumerate(self._columns) if isinstance(column, list)
        }
        stacked = _stacked(lists) if lists else {}
        columns = [stacked.get(i, column) for i, column in enumerate(self._columns)]
        return jax.tree.unflatten(self._structure, columns)


def aligned(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array (rows, *shape) in the compiled call's own type, which the call can read where it lies."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    size = rows * math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64  # bytes; from elsewhere every call would copy all rows
    return raw[start : start + size].view(dtype).reshape(rows, *shape)


def last(batches: Batch, count: int) -> Batch:
    """The last of the `count` batches that were stacked."""
    return jax.tree.map(lambda leaf: leaf[count - 1], batches)


def _kind(leaf: Any) -> tuple[Any, ...]:
    """What leaves of one column share; those that can be read on the host for nothing go by numpy's type."""
    if isinstance(leaf, jax.Array):
        on_host = [device.platform for device in leaf.sharding.device_set] == ["cpu"]
        weak = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.weak_type  # neither has a numpy type
        return np.ndarray if on_host and not weak else jax.Array, leaf.shape, leaf.dtype, weak
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.ndarray, leaf.shape, leaf.dtype, False
    return (type(leaf),)  # a number, whose type is weak


@jax.jit
def _stacked(columns: dict[int, list[Any]]) -> dict[int, jax.Array]:
    return {i: jnp.stack(leaves) for i, leaves in columns.items()}
