"""Load batches and move them to the device in advance."""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from ..checks import check_batch
from ..messages import warn_user
from ..trees import Batch, copy_numpy

Error = TypeVar("Error", bound=BaseException)

PATIENCE = 5.0
"""Seconds that `close` waits for a thread that is loading a batch."""


def not_the_end(error: Error) -> Error | RuntimeError:
    """Return an error of the data; a StopIteration, which would look like the end of the data, as a RuntimeError."""
    if not isinstance(error, StopIteration):
        return error
    new = RuntimeError(
        "The data raised StopIteration outside of __next__: a next() call inside it ran out of items. "
        "Give that next() a default."
    )
    new.__cause__ = error
    return new


class Prefetch(Iterator[Batch]):
    """Loads batches in a background thread and moves them to the device, at most `depth` in advance.

    The thread runs from the first call of `next` until the batches end or `close` is called. Batches that are loaded
    by then are kept for later calls of `next`. An error in the source is raised when its batch is due.

    Args:
        source: an iterator of batches. If it has `get_state`, its state is kept with each batch, so `get_state`
            does not depend on how many batches were loaded in advance.
        depth: the maximum number of batches to hold.
        put: moves a batch to the device.
    """

    def __init__(self, source: Any, depth: int, put: Callable[[Batch], Batch] = jax.device_put):
        self._source, self._depth, self._put = source, depth, put
        self._drawn: deque[tuple[Batch, Any, BaseException | None]] = deque()
        self._changed = threading.Condition()  # guards what follows
        self._thread: threading.Thread | None = None
        self._running = self._closing = False
        self._loading = 0  # batches that the thread is loading: 0 or 1
        self._left = math.inf  # batches that it may load after that
        if hasattr(source, "get_state") and hasattr(source, "set_state"):
            self._state = self._source_state()
            self.get_state: Callable[[], Any] = lambda: self._state
            self.set_state: Callable[[Any], None] = source.set_state

    def limit(self, count: float) -> None:
        """Load no more in advance than what the next `count` calls of `next` return."""
        with self._changed:
            self._left = count - len(self._drawn) - self._loading
            self._changed.notify_all()

    def __next__(self) -> Batch:
        with self._changed:
            if not self._drawn:
                self._request()
                self._changed.wait_for(lambda: self._drawn)
            batch, state, error = self._drawn.popleft()
            self._changed.notify_all()
        if error is not None:
            self.close()
            raise error
        self._state = state
        return batch

    def _request(self) -> None:
        """Have the thread load at least one batch."""
        self._closing, self._left = False, max(self._left, 1 - self._loading)
        if self._running:  # also after a `close` that did not wait for its end
            self._changed.notify_all()
        else:
            self._running = True
            self._thread = threading.Thread(target=self._draw, name="onstep-prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread after the batch it is loading. If that takes too long, warn and leave the thread behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                warn_user(
                    f"The prefetch thread has waited more than {PATIENCE:g} s for the next batch of the data "
                    f"({type(self._source).__name__}). The run ends without it; the thread ends with its batch or with "
                    "the process."
                )

    def _draw(self) -> None:
        error: BaseException | None = None
        while error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (len(self._drawn) < self._depth and self._left > 0))
                if self._closing:
                    self._running = False
                    return
                self._left, self._loading = self._left - 1, 1
            batch = state = None
            try:
                batch = next(self._source)
            except BaseException as raised:  # includes StopIteration, which ends the batches
                error = raised
            else:
                try:
                    check_batch(batch)
                    batch = jax.block_until_ready(self._put(copy_numpy(batch)))
                    state = self._source_state()
                except BaseException as raised:
                    error = not_the_end(raised)
            with self._changed:
                self._drawn.append((batch, state, error))
                self._running, self._loading = error is None, 0
                self._changed.notify_all()

    def _source_state(self) -> Any:
        return copy.deepcopy(self._source.get_state()) if hasattr(self._source, "get_state") else None
