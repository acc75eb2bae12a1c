"""What a source of data may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .batches import Pass
from .sharding import Spread
from .trees import Batch

Data = Any
"""An iterable of batches; a callable `epoch -> iterable`; a loader whose iterator has
`get_state`/`set_state`."""


def length(data: Data) -> int | None:
    """Batches in a pass over the data, None where it cannot tell."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def open_pass(data: Data, number: int, spread: Spread | None = None, *, ragged: bool = False) -> Iterator[Batch]:
    """The batches of one pass over the data; passes are counted from 0.

    Of several processes, over which they are `spread`, each reads its own: `Batches` gives it its part,
    and of a batch that does not divide the whole, if `ragged`.

    Raises:
        TypeError: the source is neither an iterable of batches nor a callable.
    """
    source: Any = data(number) if callable(data) else data
    check(source)
    batches = iter(source)
    if spread is not None and spread.processes > 1 and isinstance(batches, Pass):
        batches.spread, batches.ragged = spread, ragged
    return batches


def check(source: Any) -> None:
    """Raises a TypeError unless it can be a source of batches."""
    if isinstance(source, (dict, str)) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(
            "data needs to be an iterable of batches or a callable epoch -> iterable, "
            f"got {type(source).__name__}. For arrays in memory: Batches(arrays, batch_size)."
        )
