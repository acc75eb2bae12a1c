"""Means that do not depend on the order or the grouping of what they are taken over."""

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


def merges(value: Any) -> bool:
    """Whether a metric is one of clu's, which merge exactly, and not a plain scalar."""
    return hasattr(value, "merge") and hasattr(value, "compute")


def to_float(value: Any, name: str) -> float:
    """A host number from anything scalar; waits for the device if it must."""
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"A record needs scalars, got shape {array.shape} for {name!r}.")
    return float(array)


class Rows(dict[str, Any]):
    """What the last step of a block returned, by name; and beside it what all of them did.

    Attributes:
        columns: by name, arrays (rows, ...).
        present: for each of the block's steps, by name, whether it was there; a name that is not
            in it always was.
    """

    def __init__(
        self, last: dict[str, Any], columns: dict[str, Any], count: int, present: Mapping[str, Sequence[bool]]
    ):
        super().__init__(last)
        self.columns: dict[str, Any] = columns
        self.count: int = count
        self.present: Mapping[str, Sequence[bool]] = present

    def read(self) -> dict[str, list[Any]]:
        """By name, the values of the steps that had one; waits for the device."""
        there = {name: self.present.get(name, [True] * self.count) for name in self.columns}
        return {name: list(compress(_rows(column, self.count), there[name])) for name, column in self.columns.items()}


def _rows(column: Any, count: int) -> list[Any]:
    if merges(column):
        host = jax.device_get(column)
        return [jax.tree.map(operator.itemgetter(i), host) for i in range(count)]
    return np.asarray(column)[:count].astype(float).tolist()


def fetch(steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What several steps returned, read to the host: by name, the values in order.

    Waits for the device. A clu metric comes back as itself, with its leaves on the host.
    """
    if jax.default_backend() != "cpu":  # there a read is a view; elsewhere let the transfers overlap
        for leaf in jax.tree.leaves([step.columns if isinstance(step, Rows) else step for step in steps]):
            leaf.copy_to_host_async()
    columns: dict[str, list[Any]] = {}
    for step in steps:
        if isinstance(step, Rows):
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
class Tally:
    """The mean of the values added so far, whatever the order in which they came.

    Sums are exact (`math.fsum`), so a mean does not depend on how a run was cut. A clu
    metric is merged value by value instead.
    """

    count: int = 0
    terms: list[float] = field(default_factory=list)
    merged: Any = None

    def add(self, values: list[Any], weights: list[int] | None = None) -> None:
        """Adds values as `fetch` gives them, each counting by its weight (once without)."""
        if values and merges(values[0]):
            before = [] if self.merged is None else [self._unmerged(values[0])]
            self.merged = functools.reduce(lambda a, b: a.merge(b), before + values)
        else:
            self.terms += values if weights is None else [v * w for v, w in zip(values, weights, strict=True)]
        self.count += len(values) if weights is None else sum(weights)
        if len(self.terms) > 4096:
            self.terms = _expansion(self.terms)

    def _unmerged(self, like: Any) -> Any:
        """What was merged before, which comes back from a snapshot as bare leaves."""
        if isinstance(self.merged, list):
            return jax.tree.unflatten(jax.tree.structure(like), self.merged)
        return self.merged

    def mean(self, name: str) -> float:
        """The mean of what was added."""
        if self.merged is not None:
            return to_float(self.merged.compute(), name)
        return _fsum(self.terms) / self.count

    def get_state(self) -> dict[str, Any]:
        """As JSON values and arrays."""
        leaves = None if self.merged is None else [np.asarray(x) for x in jax.tree.leaves(self.merged)]
        return {"count": self.count, "terms": _expansion(self.terms), "leaves": leaves}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """The tally that `get_state` described."""
        return cls(state["count"], list(state["terms"]), state["leaves"])


def _fsum(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (ValueError, OverflowError):  # inf - inf, or beyond the range of a double
        return sum(terms)


def _expansion(terms: list[float]) -> list[float]:
    """The same sum in few terms, exactly: rounding errors are kept as terms of their own."""
    out: list[float] = []
    while rest := _fsum(terms + [-x for x in out]):
        if not math.isfinite(rest):
            return [rest]
        out.append(rest)
    return out
