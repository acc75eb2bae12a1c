"""Batches in: epochs, the position in the data, and what a source of data may be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .notice import notice
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


def open_pass(data: Data, number: int) -> Iterator[Batch]:
    """The batches of one pass over the data; passes are counted from 0.

    Raises:
        TypeError: the source is neither an iterable of batches nor a callable.
    """
    source: Any = data(number) if callable(data) else data
    _check(source)
    return iter(source)


def _check(source: Any) -> None:
    if isinstance(source, (dict, str)) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(
            "data needs to be an iterable of batches or a callable epoch -> iterable, "
            f"got {type(source).__name__}. For arrays in memory: Batches(arrays, batch_size)."
        )


class Feed:
    """One source of batches, read epoch by epoch; knows where it stands.

    An epoch is one pass over the data, or `epoch_steps` batches of passes read one after the
    other. Where the length of an epoch is unknown, one batch is drawn ahead of its use to
    learn whether it goes on; the position never depends on that.
    """

    def __init__(self, data: Data, epoch_steps: int | None = None):
        if not callable(data):
            _check(data)
        self.data = data
        self.length = epoch_steps or length(data)
        self.one_shot = not callable(data) and hasattr(data, "__next__")
        self._cut = epoch_steps is not None
        self._pass = 0
        self._used = 0  # batches of this pass that were handed out
        self._sought: Any = None  # the loader's state to go on from
        self._iterator: Iterator[Batch] | None = None
        self._loader: Any = None  # the pass's own iterator, where it has get_state/set_state
        self._ahead: list[Batch] = []  # at most one batch, drawn and not handed out
        self._before: Any = None  # the loader's state before that draw
        self._failure: Exception | None = None  # of that draw, raised when its batch is due

    def begin_epoch(self, epoch: int) -> None:
        """Draws the first batch of an epoch, counted from 0.

        Raises:
            ValueError: there is none.
        """
        if self._more():
            if self._failure is not None:
                raise self._failure
        elif self.one_shot:
            raise ValueError(
                f"The data is exhausted at the start of epoch {epoch + 1}: a {type(self.data).__name__} can be read "
                "only once. Pass a list, a callable epoch -> iterable, or epochs=1."
            )
        else:
            raise ValueError(f"The training data yielded no batches in epoch {epoch + 1}: {type(self.data).__name__}.")

    def take(self, count: int) -> Iterator[Batch]:
        """The next `count` batches; fewer only where the epoch ends."""
        due = self._used + count
        if count > 0 and self._more():
            if self._failure is not None:
                raise self._failure
            self._used += 1
            yield self._ahead.pop()
            try:
                for batch in islice(self._iterator or (), count - 1):
                    self._used += 1
                    yield batch
            except Exception as error:
                self._noted(error)
                raise
        if self._used < due and self.length is not None and not self._cut:
            raise ValueError(
                f"The data has len {self.length}, but pass {self._pass + 1} ended after {self._used} batches. "
                f"Mend its len, or give run epoch_steps={self._used}."
            )

    def ended(self, epoch_step: int) -> bool:
        """Whether the epoch is over after so many of its batches."""
        if self.length is None:
            return not self._more()
        return epoch_step >= self.length

    def end_epoch(self) -> None:
        """The epoch is over: the next batch is the next epoch's."""
        if not self._cut:
            self._next_pass()
            self._iterator = None

    def peek(self) -> Batch:
        """The batch that `take` will give next."""
        if self._more() and self._failure is not None:
            raise self._failure
        return self._ahead[0]

    def replace(self, batch: Batch) -> None:
        """Puts a batch in the place of the one that `peek` gave."""
        self._ahead[0] = batch

    def position(self) -> dict[str, Any]:
        """Where the first batch stands that was not handed out, as JSON values and arrays."""
        state = self._before if self._ahead or self._failure else self._loader_state()
        return {"pass": self._pass, "used": self._used, "loader": state, "length": self.length}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes to a position that `position` gave, when the next batch is drawn: by the loader's
        state where it has one, else by skipping the batches already used.

        Raises:
            ValueError: the position is in data with another number of batches to an epoch.
        """
        there, here = (length or "an unknown number of" for length in (position["length"], self.length))
        if there != here:
            raise ValueError(
                f"The saved run's epochs have {there} batches, this run's {here}. Give the same data and epoch_steps."
            )
        self._pass, self._used, self._sought = position["pass"], position["used"], position["loader"]

    def again(self, other: Feed) -> Feed:
        """Itself, if it reads what `other` would and still stands where that one seeks to; so an
        iterator that can be read only once goes on where an earlier run left it.
        """
        if self.data is not other.data or self._cut != other._cut:
            return other
        if (self._pass, self._used) == (other._pass, other._used):
            return self
        if self.one_shot and other._sought is None:
            raise ValueError(
                f"The {type(self.data).__name__} was read beyond where the run shall go on. Pass a new one."
            )
        return other

    def _more(self) -> bool:
        """Whether there is another batch (or a failure to draw one); draws it to find out."""
        if self._ahead or self._failure is not None:
            return True
        try:
            if self._iterator is None:
                self._iterator = self._passes() if self._cut else self._open()
            self._before = self._loader_state()
            self._ahead.append(next(self._iterator))
        except StopIteration:
            return False
        except Exception as error:
            self._failure = self._noted(error)
        return True

    def _open(self) -> Iterator[Batch]:
        """The present pass, from where it was left."""
        iterator = open_pass(self.data, self._pass)
        self._loader = iterator if hasattr(iterator, "get_state") and hasattr(iterator, "set_state") else None
        if self._loader is not None and self._sought is not None:
            self._loader.set_state(self._sought)
        elif self._used:
            notice(f"skipping {self._used} batches of the data that were used before")
            skipped = sum(1 for _ in islice(iterator, self._used))
            if skipped < self._used:
                raise ValueError(f"The run had used {self._used} batches of this pass, but the data now has {skipped}.")
        self._sought = None
        return iterator

    def _next_pass(self) -> None:
        self._pass, self._used = self._pass + 1, 0
        self._loader = self._before = None

    def _passes(self) -> Iterator[Batch]:
        """Pass after pass, for epochs that are cut to `epoch_steps`."""
        while True:
            yield from self._open()
            if self.one_shot or not self._used:
                raise ValueError(
                    f"The data ended after {self._used} batches, but an epoch needs {self.length} (epoch_steps)."
                )
            self._next_pass()

    def _loader_state(self) -> Any:
        if self._loader is None:
            return self._sought
        return copy.deepcopy(self._loader.get_state())

    def _noted(self, error: Exception) -> Exception:
        error.add_note(f"onstep: raised by the data, at batch {self._used + 1} of pass {self._pass + 1}")
        return error
