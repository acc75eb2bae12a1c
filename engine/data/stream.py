"""BatchStream: the batches of a run, epoch by epoch, and the position in them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from ..checks import check_batch
from ..messages import log_user
from ..placement import Placement
from ..spans import DATA, Spans
from ..trees import Batch, copy_numpy
from .batches import Batches, EpochIterator
from .prefetch import Prefetch, not_the_end
from .source import Data, check_data, choose_pass, length, read_pass
from .stacking import BatchStacker

_END = object()


class WaitInterrupted(BaseException):
    """Ends the wait for a batch; raised inside the data by `BatchStream.interrupt`. The run then ends with a stop.

    Not an `Exception`, so that an `except Exception` in the data does not swallow it.
    """


class BatchStream:
    """Reads a source of batches epoch by epoch, and tracks its position.

    An epoch is one pass over the data, or `epoch_steps` batches from consecutive passes. A batch is drawn when a step
    needs it, or when the end of data without a length must be noticed. The position does not depend on that.

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

    Raises:
        TypeError, ValueError: the data cannot be read as batches; see `check_data`.
    """

    def __init__(
        self,
        data: Data,
        epoch_steps: int | None,
        placement: Placement,
        prefetch: int = 0,
        put: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        check_data(data)
        self.data: Data = data
        self.epoch_steps: int | None = epoch_steps
        self.length: int | None = epoch_steps or length(data)
        self.one_shot: bool = not callable(data) and hasattr(data, "__next__")
        self.pass_index: int = 0
        self.used: int = 0
        self._placement, self._prefetch, self._put = placement, prefetch, put
        self._iterator: Any = None
        self._stable = False  # whether the source never reuses a batch's memory; batches of all others are copied
        self._loader: Any = None  # the iterator of the pass, if it has get_state and set_state
        self._ahead: list[Batch] = []  # at most one batch, drawn but not returned yet
        self._replaced = False  # whether a callback replaced that batch
        self._failure: Exception | None = None  # an error in drawing it, raised when the batch is due
        self._ended = False  # whether the pass has ended: its iterator is not asked again
        # A state of the loader, usually that before the next batch, and how many batches of the pass come before it.
        self._before: tuple[Any, int] = None, 0
        self._pass_length: int | None = None  # batches in the pass, if a callable returned data with a length
        self._end: float = math.inf  # the run needs this many batches of the pass, or fewer
        self._taking: Any = None  # the generator that `take` returned last
        self._waiting = False  # whether a batch is being drawn elsewhere
        self._interrupted = False

    def observe(self, spans: Spans) -> None:
        """From now on, report every wait for a batch as a span, except in `take` and `blocks`."""
        spans.instrument(self, DATA, "begin_epoch", "peek", "ended", "end_epoch")

    def skip(self) -> None:
        """Open the pass that a resumed run is in, and draw the batches that it has already used."""
        self._waiting = True
        try:
            self._iterator = self._open()
        except WaitInterrupted:  # the run ends before its first step
            pass
        except Exception as error:
            raise self._add_note(error) from error.__cause__
        finally:
            self._waiting = False

    @property
    def must_skip(self) -> bool:
        """Whether the next batch can only be reached by drawing others before it."""
        return self._iterator is None and self.used > 0 and self._before[0] is None

    def begin_epoch(self, epoch: int, needed: float = math.inf) -> None:
        """Draw the next batch of an epoch, if there is one.

        Args:
            epoch: the epoch, counted from 0.
            needed: batches until the run reaches its target. The prefetch thread loads no more.

        Raises:
            ValueError: the data has no batch for a new epoch, or has one although its length is 0.
        """
        self._end = self.used + needed
        if isinstance(self._iterator, Prefetch):
            self._iterator.limit(needed - len(self._ahead))
        kind = type(self.data).__name__
        if self._has_next():
            self.peek()
            if self.length == 0:
                raise ValueError(
                    f"The data has len 0, but pass {self.pass_index + 1} yielded batch 1. Fix its __len__."
                )
        elif self.used and self.length is None:
            return  # a resumed run, whose epoch was complete
        elif self.one_shot:
            raise ValueError(
                f"The data is exhausted at the start of epoch {epoch + 1}: a {kind} can be read "
                "only once. Pass a list, a callable epoch -> iterable, or epochs=1."
            )
        else:
            raise ValueError(f"The training data yielded no batches in epoch {epoch + 1}: {kind}.")

    def check_epochs(self, epochs: int) -> None:
        """Raise a ValueError if the data can be read only once, but the run needs several passes.

        Args:
            epochs: the number of epochs to come.
        """
        if self.one_shot and self.epoch_steps is None and epochs > 1:
            raise ValueError(
                f"The run needs {epochs} passes over the data, but a {type(self.data).__name__} can be read only once. "
                "Pass a list or a callable epoch -> iterable; or epochs=1, or the batches in an epoch (epoch_steps=)."
            )

    def take(self, count: int) -> Iterator[tuple[Batch, int]]:
        """Yield the next `count` batches, each with the number 1; fewer only if the epoch ends."""
        self._taking = self._take(count)
        return self._taking

    def _take(self, count: int) -> Iterator[tuple[Batch, int]]:
        while count > 0 and self._has_next():
            stable = self._stable
            batch = self.peek() if stable else copy_numpy(self.peek())
            # A batch is counted immediately before its `yield`, with no call between, where a signal could be handled.
            self._ahead, self.used, count = [], self.used + 1, count - 1
            yield batch, 1
            try:
                batches = islice(self._iterator, count)
                for batch in batches if stable else map(copy_numpy, batches):
                    self.used, count = self.used + 1, count - 1
                    yield batch, 1
            except Exception as error:
                self._add_note(error)
                raise
            self._ended = count > 0
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
            self._iterator.set_state(self._before[0])  # so that the block begins with the batch drawn ahead
            self._ahead.clear()
            return self._iterator.block(most, block_size)
        first = self._ahead.pop()
        try:
            stack = BatchStacker(first, block_size)
            with suppress(WaitInterrupted):  # the run ends after the steps of the batches drawn before
                while stack.count < most and self._draw(stack.count) and self._ahead and stack.add(self._ahead[0]):
                    self._ahead.clear()
            return stack.batches(), stack.count
        except TypeError:
            check_batch(first)  # which says it in the user's words, if that is why
            raise

    def _check_end(self, missing: int) -> None:
        if missing and self.length is not None and self.epoch_steps is None:
            raise ValueError(
                f"The data has len {self.length}, but pass {self.pass_index + 1} ended after {self.used} batches. "
                f"Fix its __len__, or pass epoch_steps={self.used} to run."
            )

    def epoch_done(self, epoch_step: int) -> bool:
        """Return whether the epoch is known to be over after `epoch_step` of its batches."""
        if self.length is None:
            return self._ended and not self._ahead
        return epoch_step >= self.length

    def ended(self) -> bool:
        """Return whether an epoch of unknown length has ended. Draws the next batch to find out."""
        return self.length is None and not self._has_next()

    def end_epoch(self, check: bool = True) -> None:
        """End the epoch; the next batch starts a new epoch.

        Args:
            check: whether to try to draw another batch, to find out whether the pass is longer than its length.

        Raises:
            ValueError: the pass is longer.
        """
        if self.epoch_steps is not None:
            return
        if check and self.length is not None and not self.one_shot and self._is_longer():
            raise ValueError(
                f"The data has len {self.length}, but pass {self.pass_index + 1} yielded batch {self.used + 1}. "
                f"Fix its __len__, or pass epoch_steps={self.length} to run."
            )
        self._next_pass()

    def _is_longer(self) -> bool:
        try:
            longer = self._has_next()
        except WaitInterrupted:  # the run ends, and this epoch is complete as far as is known
            return False
        if self._failure is not None:
            raise self._failure
        return longer

    def peek(self) -> Batch:
        """Return the next batch without consuming it."""
        if self._has_next() and self._failure is not None:
            raise self._failure
        return self._ahead[0]

    def replace(self, batch: Batch) -> None:
        """Replace the next batch. It is copied, so the arrays can be filled again for the step after it."""
        self.peek()
        self._ahead[0], self._replaced = copy_numpy(batch), True

    def interrupt(self) -> None:
        """End the wait for a batch, if the thread that calls this waits for one in the code of the data.

        Only a signal handler can call it then. `Batches`, lists and tuples are never waited for.

        Raises:
            WaitInterrupted: the thread waits.
        """
        never = isinstance(self._iterator, EpochIterator) or isinstance(self.data, (list, tuple))
        if not never and (self._waiting or (self._taking is not None and self._taking.gi_running)):
            self._interrupted = True
            raise WaitInterrupted

    def position(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON values and arrays."""
        state, before = self._position()
        return {
            "pass": self.pass_index,
            "used": self.used,
            "loader": state,
            "before": before,
            "length": self.length,
            "pass_length": self._pass_length,
        }

    def _position(self) -> tuple[Any, int]:
        """Return a state of the loader, and the number of batches of the pass before it.

        That is the state before the next batch, unless a wait for that batch was interrupted: the loader may have
        changed its state in the meantime.
        """
        if self._iterator is None or self._ahead or self._failure is not None or self._interrupted:
            return self._before
        return self._loader_state(), self.used

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a position when the next batch is drawn: restore the loader's state, or skip used batches.

        Raises:
            ValueError: the position was saved with another number of batches per epoch.
        """
        saved, here = (n or "an unknown number of" for n in (position["length"], self.length))
        if saved != here:
            if isinstance(self.data, Batches) and position["loader"] is not None:
                self.data(position["pass"]).set_state(position["loader"])  # an error that says why
            raise ValueError(
                f"The saved run's epochs have {saved} batches, this run's {here}. Pass the same data, batch size and "
                "epoch_steps."
            )
        self.pass_index, self.used, self._pass_length = position["pass"], position["used"], position.get("pass_length")
        self._before = position["loader"], position.get("before", self.used)

    def resume_as(self, new: BatchStream) -> BatchStream:
        """Return this stream if it is already where `new` would start, otherwise `new`.

        So an iterator that can be read only once continues where an earlier run left it.
        """
        if self.data is not new.data or (self.epoch_steps is None) != (new.epoch_steps is None):
            return new
        if (self.pass_index, self.used) == (new.pass_index, new.used) and not self._interrupted:
            return self
        if self.one_shot and new.position()["loader"] is None:
            how = "interrupted while it waited for a batch" if self._interrupted else "read beyond the step"
            where = "" if self._interrupted else " from which the run resumes"
            raise ValueError(f"The {type(self.data).__name__} was {how}{where}. Pass a new one.")
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
        if self._ended:
            return False
        self._waiting = True
        try:
            if self._iterator is None:
                self._iterator = self._open()
            self._before = self._loader_state(), self.used + unused
            batch = next(self._iterator, _END)
            if batch is _END:
                self._ended = True
                return False
            self._ahead.append(batch)
            self._replaced = False
        except Exception as error:  # raised once the batches before it are used
            self._failure = self._add_note(not_the_end(error), unused)
        finally:
            self._waiting = False
        return True

    def _open(self) -> Iterator[Batch]:
        """Return an iterator over the rest of the current pass."""
        source = choose_pass(self.data, self.pass_index)
        self._check_pass_length(length(source) if callable(self.data) else None)
        iterator = read_pass(source, self._placement)
        self._loader = iterator if hasattr(iterator, "get_state") and hasattr(iterator, "set_state") else None
        state, before = self._before
        if self._loader is None or state is None:
            before = 0
        else:
            self._loader.set_state(state)
        if count := self.used - before:
            log_user(f"skipping {f'the first {count}' if not before else count} batches of the data, already used")
            self._skip(iterator, count, before)
        if self._prefetch:
            iterator = Prefetch(iterator, self._prefetch, self._put)
            iterator.limit(self._end - self.used)
            self._loader = iterator if self._loader is not None else None
        self._stable = isinstance(iterator, (EpochIterator, Prefetch)) or isinstance(self.data, (list, tuple))
        return iterator

    def _skip(self, iterator: Iterator[Batch], count: int, before: int) -> None:
        """Draw batches that were already used, and drop them."""
        skipped = sum(1 for _ in islice(iterator, count))
        if skipped < count:
            raise ValueError(
                f"The run had used {self.used} batches of this pass, but the data now has only {before + skipped}."
            )

    def _check_pass_length(self, here: int | None) -> None:
        """Raise a ValueError if a resumed run finds its pass with another number of batches."""
        saved, self._pass_length = self._pass_length, here
        if None not in (saved, here) and saved != here:
            raise ValueError(
                f"Pass {self.pass_index + 1} of the data had {saved} batches in the saved run, but has {here} in this "
                "one. Pass a callable that returns the same batches."
            )

    def close(self) -> None:
        """Stop the prefetch thread."""
        if isinstance(self._iterator, Prefetch):
            self._iterator.close()

    def _next_pass(self) -> None:
        if not self.one_shot:  # an iterator continues, with the batches that its thread has loaded
            self.close()
            self._iterator = self._loader = None
        self._end -= self.used
        self.pass_index, self.used, self._pass_length = self.pass_index + 1, 0, None
        self._before, self._ended = (None, 0), False

    def _continue_in_next_pass(self) -> bool:
        """Go to the next pass in the middle of an epoch, which has `epoch_steps` batches."""
        if self.one_shot or not self.used:
            raise ValueError(
                f"The data ended after {self.used} batches, but an epoch needs {self.length} (epoch_steps)."
            )
        self._next_pass()
        return self._has_next()

    def _loader_state(self) -> Any:
        return None if self._loader is None else copy.deepcopy(self._loader.get_state())

    def _add_note(self, error: Exception, unused: int = 0) -> Exception:
        number = self.used + unused + 1
        error.add_note(f"onstep: raised by the data, at batch {number} of pass {self.pass_index + 1}")
        return error
