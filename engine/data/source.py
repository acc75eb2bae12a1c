"""Sources of batches, and one pass over a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..placement import Placement
from ..trees import Batch
from .batches import EpochIterator

Data = Any
"""An iterable of batches, a callable `epoch -> iterable`, or a loader (its iterator has `get_state`, `set_state`)."""


class NoData:
    """The source of a run without data: one endless pass, in which every batch is None."""

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        return None

    def get_state(self) -> dict[str, Any]:
        """Return the position: nothing, because all batches are equal."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""


NO_DATA = NoData()


def length(data: Data) -> int | None:
    """Return the number of batches in a pass over the data, or None if it has no length."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def open_pass(data: Data, number: int, placement: Placement, *, ragged: bool = False) -> Iterator[Batch]:
    """Return an iterator over the batches of one pass; passes are counted from 0.

    With several processes, each reads its own part. `Batches` selects the rows of each process itself; with `ragged`,
    every process gets all rows of a batch that does not divide evenly.

    Raises:
        TypeError: the source is neither an iterable of batches nor a callable.
    """
    source: Any = data(number) if callable(data) else data
    check_source(source)
    batches = iter(source)
    if isinstance(batches, EpochIterator):
        batches.divide(placement, ragged)
    return batches


def check_source(source: Any) -> None:
    """Raise a TypeError unless `source` can be a source of batches."""
    if isinstance(source, (dict, str)) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(
            "data needs to be an iterable of batches or a callable epoch -> iterable, "
            f"got {type(source).__name__}. For arrays in memory: Batches(arrays, batch_size)."
        )
