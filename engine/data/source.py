"""Sources of batches, and one pass over a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..checks import check_signature
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
    except (TypeError, ValueError, NotImplementedError):  # the length of an endless tf.data.Dataset is negative
        return None


def open_pass(data: Data, number: int, placement: Placement, *, ragged: bool = False) -> Iterator[Batch]:
    """Return an iterator over the batches of one pass; passes are counted from 0.

    With several processes, each reads its own part. `Batches` selects the rows of each process itself; with `ragged`,
    every process gets all rows of a batch that does not divide evenly.

    Raises:
        TypeError: the source is neither an iterable of batches nor a callable with one argument.
    """
    return read_pass(choose_pass(data, number), placement, ragged=ragged)


def choose_pass(data: Data, number: int) -> Any:
    """Return what one pass iterates over: the data, or what a callable returns for the number of the pass."""
    check_data(data)
    if not callable(data):
        return data
    source = data(number)
    if source is None:
        raise TypeError(f"The data, a callable, needs to return an iterable of batches for epoch {number}, got None.")
    check_source(source)
    return source


def read_pass(source: Any, placement: Placement, *, ragged: bool = False) -> Iterator[Batch]:
    """Return an iterator over what `choose_pass` returned; see `open_pass`."""
    batches = iter(source)
    if isinstance(batches, EpochIterator):
        batches.divide(placement, ragged)
    return batches


def check_data(data: Data) -> None:
    """Check that `data` can be a source of batches, as for `engine.run`. No batch is drawn.

    Args:
        data: an iterable of batches, or a callable `epoch -> iterable`.

    Raises:
        TypeError: it is something else, such as an array.

    >>> check_data({"x": np.zeros(8)})
    Traceback (most recent call last):
    ...
    TypeError: data needs to be an iterable of batches or a callable epoch -> iterable, got dict. ...
    """
    if not callable(data):
        check_source(data)
        return
    try:
        check_signature(data, ("epoch",), "data")
    except TypeError as error:
        raise TypeError(f"A callable as data needs one argument, the epoch: {error}") from None


def check_source(source: Any) -> None:
    """Raise a TypeError unless `source` can be a source of batches.

    An array has no batches, and neither has a tuple `(x, y)`. A list of arrays has, unless the first two share their
    first axis and differ in their rank or dtype, like inputs and labels.
    """
    if isinstance(source, (dict, str)) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(
            "data needs to be an iterable of batches or a callable epoch -> iterable, "
            f"got {type(source).__name__}. For arrays in memory: Batches(arrays, batch_size)."
        )
    if hasattr(source, "iloc"):  # a frame of pandas, whose iterator yields the names of columns
        raise TypeError(
            f"data needs to be an iterable of batches, got {type(source).__name__}. For its rows as batches: "
            'Batches({"x": frame[columns].to_numpy()}, batch_size).'
        )
    if _is_array(source):
        raise TypeError(
            f"data needs to be an iterable of batches, got one array of shape {source.shape}. "
            "For examples in memory: Batches(x, batch_size). If every row is a batch: list(x)."
        )
    if isinstance(source, (tuple, list)) and len(source) > 1 and all(map(_is_array, source[:2])):
        x, y = source[:2]
        differ = x.shape[0] == y.shape[0] and (x.ndim, x.dtype) != (y.ndim, y.dtype)
        if isinstance(source, tuple) or differ:
            kinds = " and ".join(f"{array.dtype}{list(array.shape)}" for array in (x, y))
            raise TypeError(
                f"data needs to be an iterable of batches, got a {type(source).__name__} of arrays: {kinds}. "
                'For examples in memory: Batches({"x": x, "y": y}, batch_size).'
                + (" If every array is a batch, pass a list." if isinstance(source, tuple) else "")
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array)) and value.ndim > 0
