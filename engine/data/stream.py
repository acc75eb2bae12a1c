"""BatchStream: the batches of a run, epoch by epoch, and the position in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ..messages import log_user
from ..placement import Placement
from ..spans import DATA, Spans
from ..trees import Batch, copy_numpy
from .batches import EpochIterator
from .prefetch import Prefetch
from .source import Data, check_source, length, open_pass
from .stacking import BatchStacker


class BatchStream:
    """Reads a source of batches epoch by epoch, and tracks its position.

    An epoch is one pass over the data, or `epoch_steps` batches from consecutive passes. If the length of an epoch is
    unknown, one batch is drawn ahead to find out whether the epoch continues. The position does not depend on that.

    Args:
        data: the source.
        epoch_steps: batches in an epoch, if an epoch is not one pass.
        placement: with several processes, decides which rows this one reads.
        prefetch: the maximum number of batches that a thread draws ahead.
        put: moves a batch to the device before it is used.

    Attributes:
        data: the source.
        epoch_steps: as given.
        length: batches in an epoch, None if unknown.
        one_shot: whether the data can be read only once.
        pass_index: the current pass over the data, counted from 0.
        used: the number of batches of the current pass that were returned.
    """

    def __init__(
        self,
        data: Data,
        epoch_steps: int | None,
        placement: Placement,
        prefetch: int = 0,
        put: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        if not callable(data):
            check_source(data)
        self.data: Data = data
        self.epoch_steps: int | None = epoch_steps
        self.length: int | None = epoch_steps or length(data)
        self.one_shot: bool = not callable(data) and hasattr(data, "__next__")
        self.pass_index: int = 0
        self.used: int = 0
        self._placement, self._prefetch, self._put = placement, prefetch, put
        self._sought: Any = None  # state to restore in the loader
        self._iterator: Any = None
        self._loader: Any = None  # the iterator of the pass, if it has get_state and set_state
        self._ahead: list[Batch] = []  # at most one batch, drawn but not returned yet
        self._replaced = False  # whether a callback replaced that batch
        self._before: Any = None  # the loader's state before that batch was drawn
        self._failure: Exception | None = None  # an error in drawing it, raised when the batch is due

    def observe(self, spans: Spans) -> None:
        """From now on, report every wait for a batch as a span, except in `take` and `blocks`."""
        spans.instrument(self, DATA, "begin_epoch", "peek", "epoch_done")

    def begin_epoch(self, epoch: int) -> None:
        """Draw the first batch of an epoch, counted from 0.

        Raises:
            ValueError: the data has no more batches.
        """
        if self._has_next():
            self.peek()
        elif self.one_shot:
            raise ValueError(
                f"The data is exhausted at the start of epoch {epoch + 1}: a {type(self.data).__name__} can be read "
                "only once. Pass a list, a callable epoch -> iterable, or epochs=1."
            )
        else:
            raise ValueError(f"The training data yielded no batches in epoch {epoch + 1}: {type(self.data).__name__}.")

    def take(self, count: int) -> Iterator[tuple[Batch, int]]:
        """Yield the next `count` batches, each with the number 1; fewer only if the epoch ends."""
        while count > 0 and self._has_next():
            # These sources never reuse a batch's memory; batches of all others are copied.
            stable = isinstance(self._iterator, (EpochIterator, Prefetch)) or isinstance(self.data, (list, tuple))
            batch, self._ahead = self.peek(), []
            self.used, count = self.used + 1, count - 1
            yield batch if stable else copy_numpy(batch), 1
            try:
                batches = islice(self._iterator or (), count)
                for batch in batches if stable else map(copy_numpy, batches):
                    self.used, count = self.used + 1, count - 1
                    yield batch, 1
            except Exception as error:
                self._add_note(error)
                raise
        self._check_end(count)

    def blocks(self, count: int, block_size: int, most: int) -> Iterator[tuple[Batch, int]]:
        """Yield the next `count` batches in stacks, each with the number of batches in it; fewer if the epoch ends.

        A stack holds at most `most` batches of one kind, in arrays of shape (block_size, ...).
        """
        while count > 0 and (block := self._block(min(block_size, count, most), block_size)):
            self.used, count = self.used + block[1], count - block[1]
            yield block
        self._check_end(count)

    def _block(self, most: int, block_size: int) -> tuple[Batch, int] | None:
        if isinstance(self._iterator, EpochIterator) and self._iterator.left and not self._ahead:
            return self._iterator.block(most, block_size)
        if not self._has_next():
            return None
        self.peek()
        if isinstance(self._iterator, EpochIterator) and not self._replaced:
            self._iterator.set_state(self._before)  # so that the block begins with the batch drawn ahead
            self._ahead.clear()
            return self._iterator.block(most, block_size)
        stack = BatchStacker(self._ahead.pop(), block_size)
        self._replaced = False
        while stack.count < most and self._draw(stack.count) and self._ahead and stack.add(self._ahead[0]):
            self._ahead.clear()
        return stack.batches(), stack.count

    def _check_end(self, missing: int) -> None:
        if missing and self.length is not None and self.epoch_steps is None:
            raise ValueError(
                f"The data has len {self.length}, but pass {self.pass_index + 1} ended after {self.used} batches. "
                f"Fix its __len__, or pass epoch_steps={self.used} to run."
            )

    def epoch_done(self, epoch_step: int) -> bool:
        """Return whether the epoch is over after `epoch_step` of its batches."""
        if self.length is None:
            return not self._has_next()
        return epoch_step >= self.length

    def end_epoch(self) -> None:
        """End the epoch; the next batch starts a new epoch."""
        if self.epoch_steps is None:
            self._next_pass()

    def peek(self) -> Batch:
        """Return the next batch without consuming it."""
        if self._has_next() and self._failure is not None:
            raise self._failure
        return self._ahead[0]

    def replace(self, batch: Batch) -> None:
        """Replace the next batch."""
        self.peek()  # so that it is drawn, and the position in the data includes it
        self._ahead[0], self._replaced = batch, True

    def position(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON values and arrays."""
        state = self._before if self._ahead or self._failure else self._loader_state()
        return {"pass": self.pass_index, "used": self.used, "loader": state, "length": self.length}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a position when the next batch is drawn: restore the loader's state, or skip used batches.

        Raises:
            ValueError: the position was saved with another number of batches per epoch.
        """
        saved, here = (n or "an unknown number of" for n in (position["length"], self.length))
        if saved != here:
            raise ValueError(
                f"The saved run's epochs have {saved} batches, this run's {here}. Pass the same data and epoch_steps."
            )
        self.pass_index, self.used, self._sought = position["pass"], position["used"], position["loader"]

    def resume_as(self, new: BatchStream) -> BatchStream:
        """Return this stream if it is already where `new` would start, otherwise `new`.

        So an iterator that can be read only once continues where an earlier run left it.
        """
        if self.data is not new.data or (self.epoch_steps is None) != (new.epoch_steps is None):
            return new
        if (self.pass_index, self.used) == (new.pass_index, new.used):
            return self
        if self.one_shot and new.position()["loader"] is None:
            raise ValueError(
                f"The {type(self.data).__name__} was read beyond the step from which the run resumes. Pass a new one."
            )
        return new

    def _has_next(self) -> bool:
        """Return whether there is another batch (or a failure to draw one), and draw it to find out."""
        if self._ahead or self._failure is not None or self._draw():
            return True
        return self.epoch_steps is not None and self._continue_in_next_pass()

    def _draw(self, unused: int = 0) -> bool:
        """Draw a batch; return False if the pass has ended.

        Args:
            unused: the number of batches drawn before it that are not returned yet.
        """
        try:
            if self._iterator is None:
                self._iterator = self._open()
            self._before = self._loader_state()
            self._ahead.append(next(self._iterator))
        except StopIteration:
            return False
        except Exception as error:  # raised once the batches before it are used
            self._failure = self._add_note(error, unused)
        return True

    def _open(self) -> Iterator[Batch]:
        """Return an iterator over the rest of the current pass."""
        iterator = open_pass(self.data, self.pass_index, self._placement)
        self._loader = iterator if hasattr(iterator, "get_state") and hasattr(iterator, "set_state") else None
        if self._loader is not None and self._sought is not None:
            self._loader.set_state(self._sought)
        elif self.used:
            log_user(f"skipping the first {self.used} batches of the data, which were already used")
            skipped = sum(1 for _ in islice(iterator, self.used))
            if skipped < self.used:
                raise ValueError(
                    f"The run had used {self.used} batches of this pass, but the data now has only {skipped}."
                )
        self._sought = None
        if self._prefetch:
            iterator = Prefetch(iterator, self._prefetch, self._put)
            self._loader = iterator if self._loader is not None else None
        return iterator

    def close(self) -> None:
        """Stop the prefetch thread."""
        if isinstance(self._iterator, Prefetch):
            self._iterator.close()

    def _next_pass(self) -> None:
        self.close()
        self.pass_index, self.used = self.pass_index + 1, 0
        self._iterator = self._loader = self._before = None

    def _continue_in_next_pass(self) -> bool:
        """Go to the next pass in the middle of an epoch, which has `epoch_steps` batches."""
        if self.one_shot or not self.used:
            raise ValueError(
                f"The data ended after {self.used} batches, but an epoch needs {self.length} (epoch_steps)."
            )
        self._next_pass()
        return self._has_next()

    def _loader_state(self) -> Any:
        if self._loader is None:
            return self._sought
        return copy.deepcopy(self._loader.get_state())

    def _add_note(self, error: Exception, unused: int = 0) -> Exception:
        number = self.used + unused + 1
        error.add_note(f"onstep: raised by the data, at batch {number} of pass {self.pass_index + 1}")
        return error
