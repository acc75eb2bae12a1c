"""Arrays in memory as batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..checks import CheckedCall, check_batch, check_int
from ..placement import Placement, SingleDevice
from ..representation import call_text
from ..trees import Batch, named_leaves
from .stacking import aligned_empty


class Batches(CheckedCall):
    """Arrays in memory, served in batches whose order depends only on `(seed, epoch)`.

    Calling it with an epoch returns the batches of that epoch; iterating over it returns those of epoch 0.

    Args:
        arrays: a pytree of arrays of shape (examples, ...), with the same number of examples.
        batch_size: examples in a batch.
        seed: the seed of the shuffling.
        shuffle: False keeps the order of the arrays.
        drop_last: False keeps a shorter last batch; its shape is compiled separately.

    Attributes:
        dropped: the number of examples that every epoch drops.

    Raises:
        ValueError: there are no arrays, the numbers of examples differ, or a batch is larger than the data.

    >>> batches = Batches({"x": np.arange(6)}, 2, shuffle=False)
    >>> [batch["x"].tolist() for batch in batches]
    [[0, 1], [2, 3], [4, 5]]
    """

    @classmethod
    def _check_call(cls, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(given) > 1 and getattr(given[1], "shape", ()):
            raise TypeError('Batches takes one tree of arrays: Batches({"x": x, "y": y}, batch_size).')
        super()._check_call(given, named)

    def __init__(self, arrays: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True, drop_last: bool = True):
        self._arrays = jax.tree.map(np.asarray, arrays)
        check_batch(self._arrays, "Batches")
        named = named_leaves(self._arrays)
        if scalars := [name for name, array in named.items() if not array.ndim]:
            advice = " Convert lists to arrays: np.array(...)." if scalars[0].rpartition("/")[2].isdigit() else ""
            raise ValueError(
                f"Batches needs arrays of shape (examples, ...), got a single number at {scalars[0]!r}.{advice}"
            )
        sizes = {name: len(array) for name, array in named.items()}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} has {count}" for name, count in sizes.items())
            raise ValueError(f"Batches needs the same number of examples in all arrays: {counts}.")
        if not any(sizes.values()):
            raise ValueError(f"Batches needs at least one example, got {sizes or 'no arrays'}.")
        self.examples: int = next(iter(sizes.values()))
        check_int("Batches", "batch_size", batch_size, 1)
        if batch_size > self.examples and drop_last:
            raise ValueError(
                f"Batches needs batch_size <= {self.examples}, the number of examples, got {batch_size}; "
                "or drop_last=False."
            )
        self.batch_size: int = batch_size
        self.seed: int = seed
        self.shuffle: bool = shuffle
        self.drop_last: bool = drop_last

    @property
    def dropped(self) -> int:
        """The number of examples that every epoch drops."""
        return self.examples % self.batch_size if self.drop_last else 0

    def __len__(self) -> int:
        full, rest = divmod(self.examples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __call__(self, epoch: int) -> EpochIterator:
        """Return the batches of an epoch, counted from 0."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.examples) if self.shuffle else None
        arrangement = {name: getattr(self, name) for name in _ARRANGEMENT}
        return EpochIterator(self._arrays, order, len(self), arrangement)

    def __iter__(self) -> EpochIterator:
        return self(0)

    def __repr__(self) -> str:
        shapes = {name: array.shape for name, array in named_leaves(self._arrays).items()}
        given = {name: getattr(self, name) for name in _ARRANGEMENT[1:]}
        return call_text(Batches, {"arrays": shapes, **given})


_ARRANGEMENT = ("examples", "batch_size", "seed", "shuffle", "drop_last")
"""The settings for which a position in an epoch is valid."""


class EpochIterator(Iterator[Batch]):
    """The batches of one epoch. Can seek without loading earlier batches.

    Args:
        arrays: a pytree of arrays of shape (examples, ...).
        order: the indices of the examples in the order of this epoch, or None for the order of the arrays.
        length: batches in the epoch.
        arrangement: by name, the settings for which a position is valid.
    """

    def __init__(self, arrays: Any, order: np.ndarray | None, length: int, arrangement: dict[str, Any]):
        self._arrays, self._order, self._length, self._index = arrays, order, length, 0
        self._arrangement = arrangement
        self._examples, self._size = arrangement["examples"], arrangement["batch_size"]
        self._placement: Placement = SingleDevice()
        self._ragged = False

    def divide(self, placement: Placement, ragged: bool) -> None:
        """From now on, read only this process's rows; with `ragged`, all rows of an unevenly divided batch."""
        self._placement, self._ragged = placement, ragged

    def __next__(self) -> Batch:
        if self._index >= self._length:
            raise StopIteration
        self._index += 1
        start = (self._index - 1) * self._size
        stop = min(start + self._size, self._examples)
        if self._ragged and not self._placement.divides(stop - start):
            return self._placement.replicate(self._gather(slice(start, stop)))
        return self._gather(self._placement.rows(start, stop))

    def _gather(self, rows: Any) -> Batch:
        rows = rows if self._order is None else self._order[rows]
        return jax.tree.map(lambda array: array[rows], self._arrays)

    @property
    def left(self) -> int:
        """The number of remaining batches."""
        return self._length - self._index

    def block(self, most: int, block_size: int) -> tuple[Batch, int]:
        """Return the next batches as stacked arrays, and the number of batches.

        Args:
            most: the maximum number of batches to return.
            block_size: the size of the leading axis; arrays have the shape (block size, batch size, ...).
        """
        start = self._index * self._size
        size = min(self._size, self._examples - start)
        count = max(1, min(most, (self._examples - start) // size))
        chosen: Any = slice(start, start + count * size)
        if self._placement.processes > 1:
            parts = [self._placement.rows(start + i * size, start + (i + 1) * size) for i in range(count)]
            chosen, size = np.concatenate(parts), len(parts[0])

        def gather(array: np.ndarray) -> np.ndarray:
            out = aligned_empty(block_size, (size, *array.shape[1:]), array.dtype)
            flat = out[:count].reshape(count * size, *array.shape[1:])
            if self._order is None:
                flat[:] = array[chosen]
            elif out.dtype != array.dtype:
                flat[:] = array[self._order[chosen]]
            else:
                np.take(array, self._order[chosen], axis=0, out=flat, mode="clip")  # "raise" would make another copy
            return out

        self._index += count
        return jax.tree.map(gather, self._arrays), count

    def get_state(self) -> dict[str, Any]:
        """Return the position and the settings it is valid for."""
        return {"index": self._index, "of": list(self._arrangement.values())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned.

        Raises:
            ValueError: the position was saved with other settings.
        """
        if state["of"] != list(self._arrangement.values()):
            pairs = zip(self._arrangement.items(), state["of"], strict=True)
            changed = [f"{name} {saved} became {here}" for (name, here), saved in pairs if saved != here]
            raise ValueError(f"Batches has changed since the run was saved: {', '.join(changed)}.")
        self._index = state["index"]
