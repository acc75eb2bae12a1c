"""Means that depend neither on the order nor on the grouping of their values."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import jax
import numpy as np

from .placement import read


def merges(value: Any) -> bool:
    """Return whether a metric is one of clu's, which merge exactly, and not a plain scalar."""
    return hasattr(value, "merge") and hasattr(value, "compute")


def to_float(value: Any, name: str) -> float:
    """Return a scalar as a number on the host, waiting for the device if needed."""
    # On a CPU reads are not guarded, and permitting them would take longer than the read.
    array = np.asarray(value) if jax.default_backend() == "cpu" else read(value)
    if array.ndim:
        raise ValueError(f"A record needs scalars, got shape {array.shape} for {name!r}.")
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"A record needs numbers, got {type(value).__name__} for {name!r}.")
    return float(array)


@jax.tree_util.register_pytree_node_class
class NoMetrics(dict[str, Any]):
    """The metrics of a step that has none: an empty dict, with an array to wait for.

    Args:
        done: any output of the call that is never donated.
    """

    def __init__(self, done: Any):
        super().__init__()
        self.done: Any = done

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        """Return the array, as JAX asks for it."""
        return (self.done,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> NoMetrics:
        """Return the metrics with another array."""
        return cls(*children)


class BlockMetrics(dict[str, Any]):
    """The metrics of the last step of a block by name, and those of all its steps in columns.

    Args:
        last: the metrics of the last step.
        columns: by name, arrays of shape (block size,).
        count: the steps that the block ran.
        present: by name, for each of these steps whether it has the metric; names not listed are always present.
    """

    def __init__(
        self, last: dict[str, Any], columns: dict[str, Any], count: int, present: Mapping[str, Sequence[bool]]
    ):
        super().__init__(last)
        self.columns: dict[str, Any] = columns
        self.count: int = count
        self.present: Mapping[str, Sequence[bool]] = present

    def read(self) -> dict[str, list[Any]]:
        """Return by name the values of the steps that have one, waiting for the device."""
        present = {name: self.present.get(name, [True] * self.count) for name in self.columns}
        return {
            name: list(compress(_values(column, self.count), present[name])) for name, column in self.columns.items()
        }


def _values(column: Any, count: int) -> list[Any]:
    if merges(column):
        host = jax.device_get(column)
        return [jax.tree.map(operator.itemgetter(i), host) for i in range(count)]
    return np.asarray(column)[:count].astype(float).tolist()


def fetch(steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the metrics of several calls by name, as lists of host values in order.

    Waits for the device. A clu metric stays a metric, with its leaves on the host.
    """
    if jax.default_backend() == "cpu":  # a read is a view, and is not guarded
        return _fetch(steps)
    for leaf in jax.tree.leaves([step.columns if isinstance(step, BlockMetrics) else step for step in steps]):
        leaf.copy_to_host_async()  # so that the transfers overlap
    with jax.transfer_guard_device_to_host("allow"):  # these reads are deliberate
        return _fetch(steps)


def _fetch(steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for step in steps:
        if isinstance(step, BlockMetrics):
            for name, values in step.read().items():
                columns.setdefault(name, []).extend(values)
        else:
            for name, value in step.items():
                columns.setdefault(name, []).append(value)
    return {name: _to_host(column) for name, column in columns.items() if column}


def _to_host(column: list[Any]) -> list[Any]:
    if merges(column[0]):
        return jax.device_get(column)
    return column if isinstance(column[0], float) else [float(np.asarray(x)) for x in column]


@dataclass
class Mean:
    """The mean of the values added so far, in whatever order they came.

    Sums are exact (`math.fsum`, after Shewchuk, 1997), so a mean does not depend on where a run was interrupted.
    Clu metrics are merged one by one instead.

    >>> mean = Mean()
    >>> mean.add([1e100, 1.0, -1e100])
    >>> mean.value("loss") * 3
    1.0
    """

    count: float = 0
    terms: list[float] = field(default_factory=list)
    merged: Any = None

    def add(self, values: list[Any], weights: Sequence[float] | None = None) -> None:
        """Add values as `fetch` returns them, each with its weight (1 by default)."""
        if values and merges(values[0]):
            before = [] if self.merged is None else [self._unflatten(values[0])]
            self.merged = functools.reduce(lambda a, b: a.merge(b), before + values)
        else:
            self.terms += values if weights is None else [v * w for v, w in zip(values, weights, strict=True)]
        self.count += len(values) if weights is None else sum(weights)
        if len(self.terms) > 4096:
            self.terms = _expansion(self.terms)

    def _unflatten(self, like: Any) -> Any:
        """Return the merged metric, of which a snapshot keeps only the leaves."""
        if isinstance(self.merged, list):
            return jax.tree.unflatten(jax.tree.structure(like), self.merged)
        return self.merged

    def value(self, name: str) -> float:
        """Return the mean."""
        if self.merged is not None:
            return to_float(self.merged.compute(), name)
        return _fsum(self.terms) / self.count if self.count else math.nan  # of batches whose weight is 0

    def get_state(self) -> dict[str, Any]:
        """Return the sum as JSON values and arrays."""
        leaves = None if self.merged is None else [read(x) for x in jax.tree.leaves(self.merged)]
        return {"count": self.count, "terms": _expansion(self.terms), "leaves": leaves}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Mean:
        """Return the mean that `get_state` described."""
        return cls(state["count"], list(state["terms"]), state["leaves"])


def _fsum(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (ValueError, OverflowError):  # inf - inf, or beyond the range of a double
        return sum(terms)


def _expansion(terms: list[float]) -> list[float]:
    """Return the same sum in few terms, exactly: rounding errors become terms."""
    out: list[float] = []
    while rest := _fsum(terms + [-x for x in out]):
        if not math.isfinite(rest):
            return [rest]
        out.append(rest)
    return out
