"""Batches in: epochs, the position in the data, and what a source of data may be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .batches import Pass
from .blocks import Stack
from .notice import notice
from .prefetch import Prefetch
from .sharding import Spread
from .source import Data, check, length, open_pass
from .spans import DATA, Spans
from .trees import Batch, copied


class Feed:
    """One source of batches, read epoch by epoch; knows where it stands.

    An epoch is one pass over the data, or `epoch_steps` batches of passes read one after the
    other. Where the length of an epoch is unknown, one batch is drawn ahead of its use to
    learn whether it goes on; the position never depends on that.
    """

    def __init__(self, data: Data, epoch_steps: int | None = None, prefetch: int = 0, there: Any = None):
        if not callable(data):
            check(data)
        self.data = data
        self.length: int | None = epoch_steps or length(data)
        self.one_shot: bool = not callable(data) and hasattr(data, "__next__")
        self._cut = epoch_steps is not None
        self._prefetch, self._there = prefetch, there  # a sharding, or a Spread
        self._spread = there if isinstance(there, Spread) else None
        self._pass = 0
        self._used = 0  # batches of this pass that were handed out
        self._sought: Any = None  # the loader's state to go on from
        self._iterator: Any = None
        self._loader: Any = None  # the pass's own iterator, where it has get_state/set_state
        self._ahead: list[Batch] = []  # at most one batch, drawn and not handed out
        self._replaced = False  # whether it is another than the source gave
        self._before: Any = None  # the loader's state before that draw
        self._failure: Exception | None = None  # of that draw, raised when its batch is due

    def observe(self, spans: Spans) -> None:
        """Report the waits for a batch as spans from now on; those of `take` and `blocks` are the loop's to report."""
        spans.instrument(self, DATA, "begin_epoch", "peek", "ended")

    def begin_epoch(self, epoch: int) -> None:
        """Draws the first batch of an epoch, counted from 0.

        Raises:
            ValueError: there is none.
        """
        if self._more():
            self.peek()
        elif self.one_shot:
            raise ValueError(
                f"The data is exhausted at the start of epoch {epoch + 1}: a {type(self.data).__name__} can be read "
                "only once. Pass a list, a callable epoch -> iterable, or epochs=1."
            )
        else:
            raise ValueError(f"The training data yielded no batches in epoch {epoch + 1}: {type(self.data).__name__}.")

    def take(self, count: int) -> Iterator[tuple[Batch, int]]:
        """The next `count` batches, each with a 1; fewer only where the epoch ends."""
        while count > 0 and self._more():
            # Whose batches stay as they are, whatever is drawn after them; those of others are copied.
            own = isinstance(self._iterator, (Pass, Prefetch)) or isinstance(self.data, (list, tuple))
            batch, self._ahead = self.peek(), []
            self._used, count = self._used + 1, count - 1
            yield batch if own else copied(batch), 1
            try:
                batches = islice(self._iterator or (), count)
                for batch in batches if own else map(copied, batches):
                    self._used, count = self._used + 1, count - 1
                    yield batch, 1
            except Exception as error:
                self._noted(error)
                raise
        self._check_end(count)

    def blocks(self, count: int, rows: int, most: int) -> Iterator[tuple[Batch, int]]:
        """The next `count` batches, as far as they are alike stacked to arrays (rows, ...) of which
        at most `most` are used, each with the number of batches in it; fewer only where the
        epoch ends.
        """
        while count > 0 and (block := self._block(min(rows, count, most), rows)):
            self._used, count = self._used + block[1], count - block[1]
            yield block
        self._check_end(count)

    def _block(self, most: int, rows: int) -> tuple[Batch, int] | None:
        if isinstance(self._iterator, Pass) and self._iterator.left and not self._ahead:
            return self._iterator.block(most, rows)
        if not self._more():
            return None
        self.peek()
        if isinstance(self._iterator, Pass) and not self._replaced:
            self._iterator.set_state(self._before)  # so the batch that is ahead is in the block
            self._ahead.clear()
            return self._iterator.block(most, rows)
        stack = Stack(self._ahead.pop(), rows)
        self._replaced = False
        while stack.count < most and self._draw(stack.count) and self._ahead and stack.add(self._ahead[0]):
            self._ahead.clear()
        return stack.batches(), stack.count

    def _check_end(self, missing: int) -> None:
        if missing and self.length is not None and not self._cut:
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

    def peek(self) -> Batch:
        """The batch that `take` will give next."""
        if self._more() and self._failure is not None:
            raise self._failure
        return self._ahead[0]

    def replace(self, batch: Batch) -> None:
        """Puts a batch in the place of the one that `peek` gave."""
        self._ahead[0], self._replaced = batch, True

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
        if self._ahead or self._failure is not None or self._draw():
            return True
        return self._cut and self._go_on()

    def _draw(self, unused: int = 0) -> bool:
        """Draws a batch, with `unused` drawn and not handed out before it; False where the pass ends."""
        try:
            if self._iterator is None:
                self._iterator = self._open()
            self._before = self._loader_state()
            self._ahead.append(next(self._iterator))
        except StopIteration:
            return False
        except Exception as error:  # it is due when the batches before it are used
            self._failure = self._noted(error, unused)
        return True

    def _open(self) -> Iterator[Batch]:
        """The present pass, from where it was left."""
        iterator = open_pass(self.data, self._pass, self._spread)
        self._loader = iterator if hasattr(iterator, "get_state") and hasattr(iterator, "set_state") else None
        if self._loader is not None and self._sought is not None:
            self._loader.set_state(self._sought)
        elif self._used:
            notice(f"skipping {self._used} batches of the data that were used before")
            skipped = sum(1 for _ in islice(iterator, self._used))
            if skipped < self._used:
                raise ValueError(f"The run had used {self._used} batches of this pass, but the data now has {skipped}.")
        self._sought = None
        if self._prefetch:
            iterator = Prefetch(iterator, self._prefetch, self._there)
            self._loader = iterator if self._loader is not None else None
        return iterator

    def close(self) -> None:
        """Ends what runs beside the loop."""
        if isinstance(self._iterator, Prefetch):
            self._iterator.close()

    def _next_pass(self) -> None:
        self.close()
        self._pass, self._used = self._pass + 1, 0
        self._iterator = self._loader = self._before = None

    def _go_on(self) -> bool:
        """In the next pass, for epochs that are cut to `epoch_steps`."""
        if self.one_shot or not self._used:
            raise ValueError(
                f"The data ended after {self._used} batches, but an epoch needs {self.length} (epoch_steps)."
            )
        self._next_pass()
        return self._more()

    def _loader_state(self) -> Any:
        if self._loader is None:
            return self._sought
        return copy.deepcopy(self._loader.get_state())

    def _noted(self, error: Exception, unused: int = 0) -> Exception:
        number = self._used + unused + 1
        error.add_note(f"onstep: raised by the data, at batch {number} of pass {self._pass + 1}")
        return error
