"""End a run on a signal, or at a deadline, so that it can be resumed."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from onstep import Cadence, Callback, Loop, every
from onstep.notice import notice

ECHO = 0.1
"""Seconds in which another signal is an echo of the first: launchers pass on what their children got as well."""


class GracefulExit(Callback):
    """On SIGTERM or Ctrl-C lets the step end, everybody save and the run close, then hands the signal on.

    What comes out of `run` is then what the signal would have caused at once: KeyboardInterrupt,
    exit status 143, or whatever the handler does that was there before. A second signal is left
    to that handler there and then. Handlers are borrowed from `on_load` to `on_run_end`, in the main
    thread alone; a signal that is ignored stays so. List it first, so that it ends last.

    Args:
        deadline: when to end by the clock, with `run` returning as usual: seconds from the run's begin, or
            a moment with a time zone, looked at once a second. One that has passed runs no step. Leave
            time for a step, an evaluation and a save.
        signals: which to answer.
        name: the callback's name.

    Raises:
        ValueError: a deadline without a time zone or that is no finite number, or a signal that cannot be caught.
        KeyboardInterrupt, SystemExit: when the run has ended, see above.
    """

    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        *,
        deadline: float | datetime | None = None,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT),
        name: str | None = None,
    ):
        never = {getattr(signal, known, None) for known in ("SIGKILL", "SIGSTOP")}
        self.deadline: float | datetime | None = deadline
        self.signals: tuple[int, ...] = tuple(dict.fromkeys(signals))
        self.name: str | None = name
        for number in self.signals:
            if number in never or number not in set(signal.Signals):
                raise ValueError(f"GracefulExit needs signals that can be caught, such as SIGTERM, got {number!r}.")
        self.when: Cadence | int = Cadence()  # never
        if isinstance(deadline, datetime):
            if deadline.utcoffset() is None:
                raise ValueError(f"GracefulExit needs a deadline with a time zone, got {deadline}. Say tzinfo=UTC.")
            self.when = every(seconds=1)
        elif deadline is not None:
            if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not math.isfinite(deadline):
                raise ValueError(f"GracefulExit needs a deadline in seconds or as a datetime, got {deadline!r}.")
            self.when = every(seconds=deadline) if deadline > 0 else Cadence()
        self._loop: Loop | None = None
        self._process: int | None = None  # whose signals are answered
        self._first: int | None = None  # the signal that ends this run
        self._borrowed: dict[int, Any] = {}

    def on_load(self, loop: Loop) -> None:
        self._first, self._borrowed, self._process = None, {}, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            if self.signals:
                warnings.warn("GracefulExit answers no signals: the run is not in the main thread.", stacklevel=2)
            return
        for number in self.signals:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # None: not set from Python, so it could not be given back
                self._borrowed[number] = before
                signal.signal(number, self._receive)

    def on_run_begin(self, loop: Loop) -> None:
        self._loop = loop  # not before: a run that is restored in on_load would undo a stop
        if self._first is not None:
            self._stop(signal.Signals(self._first).name)
        if self._passed(0.0):
            self.on_step_end(loop)

    def on_step_end(self, loop: Loop) -> None:
        if self._passed(math.inf) and not loop.over:
            notice("deadline reached: the run ends here, to be resumed")
            self._stop("deadline reached")

    def on_run_end(self, loop: Loop) -> None:
        self._give_back(n for n in self._borrowed if signal.getsignal(n) == self._receive)  # a newer one stays
        self._loop = self._process = None
        if self._first is not None and loop.error is None:
            before = self._borrowed[self._first]
            if not callable(before):
                raise SystemExit(128 + self._first)
            before(self._first, None)

    def _receive(self, number: int, frame: Any) -> None:
        """The handler. It runs between two bytecodes of whatever the main thread is doing."""
        now, here = self._clock(), os.getpid() == self._process
        if here and self._first is None:
            self._first, self._at = number, now
            name = signal.Signals(number).name
            self._stop(name)
            with contextlib.suppress(Exception):  # such as a signal that came amid another write to stderr
                notice(
                    f"{name}: finishing what is due at this step, saving, then ending; again to end at once",
                    everywhere=True,
                )
        elif not here or now - self._at >= ECHO:  # not here: in a forked child, such as a loader's worker
            self._give_back(self._borrowed)
            signal.raise_signal(number)

    def _stop(self, reason: str) -> None:
        if self._loop is not None and not self._loop.over:
            self._loop.stop(reason, final=False)

    def _passed(self, elapsed: float) -> bool:
        """Whether the deadline has passed, with so many seconds since the run's begin."""
        if isinstance(self.deadline, datetime):
            return datetime.now(UTC) >= self.deadline
        return self.deadline is not None and elapsed >= self.deadline

    def _give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            signal.signal(number, self._borrowed[number])
