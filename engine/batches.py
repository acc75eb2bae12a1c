"""Arrays in memory as batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from . import checks
from .blocks import aligned
from .sharding import Spread
from .trees import Batch, leaves


class Batches:
    """Arrays in memory, served in batches; the order depends on (seed, epoch) alone.

    Calling it with an epoch gives that epoch's batches; iterating gives those of epoch 0.

    Args:
        arrays: a pytree of arrays of shape (examples, ...), one leading axis for all.
        batch_size: examples in a batch.
        seed: of the order.
        shuffle: False keeps the arrays' own order.
        drop_last: False serves a last batch that is shorter; a second shape is a second compilation.

    Raises:
        ValueError: no array, leading axes that differ, a batch larger than the data.

    >>> batches = Batches({"x": np.arange(6)}, 2, shuffle=False)
    >>> [batch["x"].tolist() for batch in batches]
    [[0, 1], [2, 3], [4, 5]]
    """

    def __init__(self, arrays: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True, drop_last: bool = True):
        self._arrays = jax.tree.map(np.asarray, arrays)
        sizes = {name: array.shape[:1] for name, array in leaves(self._arrays).items()}
        if len(set(sizes.values())) != 1 or () in sizes.values():
            raise ValueError(f"Batches needs arrays of one leading axis, got {sizes}.")
        self.examples: int = next(iter(sizes.values()))[0]
        if not self.examples:
            raise ValueError(f"Batches needs at least one example, got {sizes}.")
        checks.whole("Batches", "batch_size", batch_size, 1)
        if batch_size > self.examples and drop_last:
            raise ValueError(
                f"Batches needs batch_size <= {self.examples}, the examples there are, got {batch_size}; "
                "or drop_last=False."
            )
        self.batch_size: int = batch_size
        self.seed: int = seed
        self.shuffle: bool = shuffle
        self.drop_last: bool = drop_last

    @property
    def dropped(self) -> int:
        """Examples that an epoch leaves out."""
        return self.examples % self.batch_size if self.drop_last else 0

    def __len__(self) -> int:
        full, rest = divmod(self.examples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __call__(self, epoch: int) -> Pass:
        """The batches of an epoch, counted from 0."""
        return Pass(self, epoch)

    def __iter__(self) -> Pass:
        return Pass(self, 0)

    def _order(self, epoch: int) -> np.ndarray | None:
        return np.random.default_rng((self.seed, epoch)).permutation(self.examples) if self.shuffle else None


class Pass(Iterator[Batch]):
    """One epoch's batches; goes to any position without gathering what lies before.

    Attributes:
        spread: over several processes, each of which then gives its own part of each batch.
        ragged: whether a batch that does not divide is given whole, on every device.
    """

    spread: Spread | None = None
    ragged = False

    def __init__(self, batches: Batches, epoch: int):
        self._batches, self._index, self._order = batches, 0, batches._order(epoch)
        self._shape = [batches.examples, batches.batch_size, batches.seed, batches.shuffle, batches.drop_last]

    def __next__(self) -> Batch:
        if self._index >= len(self._batches):
            raise StopIteration
        self._index += 1
        start, size = (self._index - 1) * self._batches.batch_size, self._batches.batch_size
        rows = slice(start, start + size)
        if self.spread is None:
            return self._gathered(rows)
        numbers = np.arange(start, min(start + size, self._batches.examples))
        if self.ragged and len(numbers) % self.spread.shards:
            return self.spread.replicate(self._gathered(rows))
        return self._gathered(self.spread.part(numbers))

    def _gathered(self, rows: Any) -> Batch:
        rows = rows if self._order is None else self._order[rows]
        return jax.tree.map(lambda array: array[rows], self._batches._arrays)

    @property
    def left(self) -> int:
        """Batches that are still to come."""
        return len(self._batches) - self._index

    def block(self, most: int, rows: int) -> tuple[Batch, int]:
        """The next batches, at most so many, as arrays (rows, batch, ...); and how many they are."""
        start, size = self._index * self._batches.batch_size, self._batches.batch_size
        size = min(size, self._batches.examples - start)
        count = max(1, min(most, (self._batches.examples - start) // size))
        chosen: Any = slice(start, start + count * size)
        if self.spread is not None:
            parts = [self.spread.part(np.arange(start + i * size, start + (i + 1) * size)) for i in range(count)]
            chosen, size = np.concatenate(parts), len(parts[0])

        def gather(array: np.ndarray) -> np.ndarray:
            out = aligned(rows, (size, *array.shape[1:]), array.dtype)
            flat = out[:count].reshape(count * size, *array.shape[1:])
            if self._order is None:
                flat[:] = array[chosen]
            elif out.dtype != array.dtype:
                flat[:] = array[self._order[chosen]]
            else:
                np.take(array, self._order[chosen], axis=0, out=flat, mode="clip")  # "raise" would copy once more
            return out

        self._index += count
        return jax.tree.map(gather, self._batches._arrays), count

    def get_state(self) -> dict[str, Any]:
        """Where it stands, and in what."""
        return {"index": self._index, "of": self._shape}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, if it was in the same arrangement of the data."""
        if state["of"] != self._shape:
            names = ("examples", "batch_size", "seed", "shuffle", "drop_last")
            changed = [f"{n} {a} became {b}" for n, a, b in zip(names, state["of"], self._shape, strict=True) if a != b]
            raise ValueError(f"Batches is not the one that the saved run read: {', '.join(changed)}.")
        self._index = state["index"]
