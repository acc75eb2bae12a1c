"""Load batches and move them to the device in advance."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..trees import Batch, copy_numpy


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
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if hasattr(source, "get_state") and hasattr(source, "set_state"):
            self._state = self._source_state()
            self.get_state: Callable[[], Any] = lambda: self._state
            self.set_state: Callable[[Any], None] = source.set_state

    def __next__(self) -> Batch:
        if self._thread is None and not self._drawn:
            self._thread = threading.Thread(target=self._draw, name="onstep-prefetch", daemon=True)
            self._closing = False
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._drawn)
            batch, state, error = self._drawn.popleft()
            self._changed.notify_all()
        if error is not None:
            self.close()
            raise error
        self._state = state
        return batch

    def close(self) -> None:
        """Stop the thread after the batch it is loading."""
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            self._thread = None

    def _draw(self) -> None:
        error: BaseException | None = None
        while error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or len(self._drawn) < self._depth)
                if self._closing:
                    return
            batch = state = None
            try:
                batch = jax.block_until_ready(self._put(copy_numpy(next(self._source))))
                state = self._source_state()
            except BaseException as raised:  # includes StopIteration, which ends the batches
                error = raised
            with self._changed:
                self._drawn.append((batch, state, error))
                self._changed.notify_all()

    def _source_state(self) -> Any:
        return copy.deepcopy(self._source.get_state()) if hasattr(self._source, "get_state") else None
