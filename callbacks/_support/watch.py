"""Tells what a thread is doing when it has shown no sign of progress for a while."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable

from onstep.tools import Activity, thread_activity

TICK = 0.5
"""Seconds between two looks."""


class ActivityWatch:
    """Looks at the calling thread from another one, until `close`.

    Looking costs the thread nothing between its signs of progress, and works while it is inside a compiler or waits.

    Args:
        tell: called, in the other thread, at each look at a thread that has been silent for `after` seconds, with what
            it is doing and for how many seconds; then once with None when it shows progress again.
        after: seconds of silence.
        rarely: True doubles the silence after each call of `tell`, for output that stays on the screen.
    """

    def __init__(self, tell: Callable[[Activity | None, float], None], after: float, rarely: bool):
        self._tell, self._after, self._rarely = tell, after, rarely
        self._thread = threading.get_ident()
        self._seen: tuple[Activity, float] = Activity(""), 0.0  # what the thread does, and since when
        self._told = False
        self._closed = threading.Event()
        self.touch()
        # In the context of the caller, so that a notebook knows to which cell the output belongs.
        run = contextvars.copy_context().run
        self._watcher = threading.Thread(target=run, args=(self._watch,), name="onstep-progress", daemon=True)
        with contextlib.suppress(RuntimeError):  # the system has no thread left
            self._watcher.start()

    def touch(self) -> None:
        """Note a sign of progress."""
        self._touched = time.monotonic()
        self._limit = self._after

    def look(self) -> None:
        """Look once, and tell if the thread is silent."""
        now, touched, (seen, since) = time.monotonic(), self._touched, self._seen
        activity = thread_activity(self._thread)
        if now - touched < TICK:  # what it does now has begun since, as far as anybody can see
            since = touched
        elif activity[:3] != seen[:3]:  # the user's line may be another one
            since = now
        since = max(since, touched)
        self._seen = activity, since
        if now - touched >= self._limit:
            self._limit *= 2 if self._rarely else 1
            self._told = True
            self._tell(activity, now - since)
        elif self._told and now - touched < self._after:
            self._told = False
            self._tell(None, 0.0)

    def close(self) -> None:
        """End the other thread."""
        self._closed.set()
        if self._watcher.ident is not None:
            self._watcher.join()

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # such as a file that was closed: nothing to be shown ends a run
            while not self._closed.wait(TICK):
                self.look()
