"""Stop a run on a signal or at a deadline, so that it can be resumed."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from typing import Any

from onstep import Cadence, Callback, Loop, every
from onstep.processes import handle_sigterm
from onstep.tools import log_user, warn_user

ECHO = 0.5
"""Seconds without a signal after which another one counts as a second request.

Launchers forward signals the child has already received, some of them several times. Python may handle a signal a few
tenths of a second late, while a module is imported for example.
"""


@dataclass(eq=False, repr=False)
class GracefulExit(Callback):
    """Stops a run on SIGTERM or Ctrl-C: finishes the step, lets every callback save and end, then passes the signal on.

    Use it for runs that a scheduler may preempt or that you interrupt yourself. After everything is saved, the run
    then ends as the signal would have ended it: with KeyboardInterrupt, exit status 143, or whatever the previous
    handler does. If the run is waiting for a batch, the wait ends, and the batch is drawn again when the run resumes.
    A second signal, half a second later or more, goes to the previous handler immediately. The handlers are installed
    from `on_load` to `on_run_end`, only in the main thread. A signal that was ignored stays ignored. List this callback
    first, so that it ends last.

    With several processes, a signal to any of them stops all of them after the same step, the first that no process
    has begun. JAX handles SIGTERM then, and all processes end with exit status 143.

    Args:
        deadline: when to stop by the clock, in seconds since the run began or as a datetime with a time zone, which
            is checked once a second. `run` then returns as usual. If it has already passed, no step runs. Leave time
            for one more step, an evaluation and a save.
        signals: the signals to handle.
        name: the callback's name.

    Raises:
        ValueError: `deadline` has no time zone or is not a finite number, or a signal cannot be caught.
        KeyboardInterrupt, SystemExit: a signal ended the run, as described above.

    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> class Preempt(Callback):
    ...     def on_step_end(self, loop):
    ...         signal.raise_signal(signal.SIGTERM)  # as a scheduler does
    ...     def on_save(self, loop):
    ...         print("saving step", loop.step)
    >>> try:
    ...     result = Engine(counting_step, [GracefulExit(), Preempt()]).run(0, [1, 2, 3], epochs=1)
    ... except SystemExit as error:
    ...     print("exit status", error.code)
    saving step 1
    exit status 143
    """

    _: KW_ONLY
    deadline: float | datetime | None = None
    signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT)
    name: str | None = None

    def __post_init__(self) -> None:
        self.signals = (self.signals,) if isinstance(self.signals, int) else tuple(dict.fromkeys(self.signals))
        never = {getattr(signal, known, None) for known in ("SIGKILL", "SIGSTOP")}
        for number in self.signals:
            if number in never or number not in set(signal.Signals):
                raise ValueError(f"GracefulExit needs signals that can be caught, such as SIGTERM, got {number!r}.")
        self.when: Cadence | int = self._when()
        self.clock: Callable[[], float] = time.monotonic  # for echoes of a signal; a test can replace it
        self._loop: Loop | None = None
        self._process: int | None = None  # the process whose signals are handled
        self._first: int | None = None  # the signal that stops this run
        self._previous: dict[int, Any] = {}  # the handlers before the run
        self._all_stop = False  # whether JAX handles SIGTERM, for all processes together

    def _when(self) -> Cadence:
        """When to check the deadline; never if there is none."""
        if isinstance(self.deadline, datetime):
            if self.deadline.utcoffset() is None:
                raise ValueError(
                    f"GracefulExit needs a deadline with a time zone, got {self.deadline}. Add tzinfo=UTC."
                )
            return every(seconds=1)
        if self.deadline is None:
            return Cadence()
        number = isinstance(self.deadline, (int, float)) and not isinstance(self.deadline, bool)
        if not (number and math.isfinite(self.deadline)):
            raise ValueError(f"GracefulExit needs a deadline in seconds or as a datetime, got {self.deadline!r}.")
        return every(seconds=self.deadline) if self.deadline > 0 else Cadence()

    def on_load(self, loop: Loop) -> None:
        self._loop, self._first, self._previous, self._process = loop, None, {}, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            if self.signals:
                warn_user("GracefulExit handles no signals, because the run is not in the main thread.")
            return
        self._all_stop = signal.SIGTERM in self.signals and handle_sigterm(self._receive_together)
        for number in self.signals:
            if self._all_stop and number == signal.SIGTERM:
                continue
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):  # None: not set from Python, so it could not be restored
                self._previous[number] = previous
                signal.signal(number, self._receive)

    def on_run_begin(self, loop: Loop) -> None:
        if self._first is not None:  # again, because restoring a run in on_load undoes a stop
            self._stop(signal.Signals(self._first).name)
        if self._passed(0.0):
            self.on_step_end(loop)

    def on_step_end(self, loop: Loop) -> None:
        if self._passed(math.inf) and not loop.over:
            log_user(f"deadline reached: stopping at step {loop.step} (run again to resume)")
            self._stop("deadline reached")

    def on_run_end(self, loop: Loop) -> None:
        self._restore(n for n in self._previous if signal.getsignal(n) == self._receive)  # a newer handler stays
        self._loop = self._process = None
        handle_sigterm(None)
        if self._first is not None and loop.error is None:
            _tell(_outcome(loop), everywhere=not self._all_stop)
            previous = self._previous.get(self._first)
            if not callable(previous):
                raise SystemExit(128 + self._first)
            try:
                previous(self._first, None)
            except KeyboardInterrupt as error:
                _hide_traceback(error)
                raise

    def _receive(self, number: int, frame: Any) -> None:
        """Handle a signal. The main thread runs this between any two bytecodes."""
        now, here = self.clock(), os.getpid() == self._process
        if here and self._first is None:
            self._first, self._at = number, now
            name = signal.Signals(number).name
            if self._all_stop:
                signal.raise_signal(signal.SIGTERM)  # JAX tells the other processes
            with contextlib.suppress(Exception):  # such as a signal during another write to stderr
                text = f"{name}: finishing this step and saving before stopping. Send it again to stop immediately."
                _tell(text, everywhere=True)
            if self._loop is not None and not self._loop.over:
                self._loop.interrupt(name)  # last, because it raises if the run is waiting for a batch
        elif here and now - self._at < ECHO:
            self._at = now  # the storm of the first signal is not over
        else:  # a second request, or in a forked child, such as a loader's worker
            self._restore(self._previous)
            signal.raise_signal(number)

    def _receive_together(self) -> None:
        """Handle SIGTERM to any process; all processes call this after the same step."""
        if self._first is None:
            self._first = signal.SIGTERM
            _tell("SIGTERM: saving before stopping", everywhere=False)
        self._stop(signal.Signals(self._first).name)

    def _stop(self, reason: str) -> None:
        if self._loop is not None and not self._loop.over:
            self._loop.stop(reason, final=False)

    def _passed(self, elapsed: float) -> bool:
        """Return whether the deadline has passed, `elapsed` seconds after the run began."""
        if isinstance(self.deadline, datetime):
            return datetime.now(UTC) >= self.deadline
        return self.deadline is not None and elapsed >= self.deadline

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            signal.signal(number, self._previous[number])


def _tell(text: str, everywhere: bool) -> None:
    with contextlib.suppress(Exception):  # such as a signal during another write to stderr
        log_user(text, everywhere=everywhere)


def _outcome(loop: Loop) -> str:
    """Return what is saved of a run that a signal has stopped."""
    steps = [step for checkpoints in loop.checkpoints for step in checkpoints.steps()]
    if not steps:
        reason = "no step has run" if loop.checkpoints and not loop.step else "the run has no Checkpoint callback"
        return f"stopped at step {loop.step}; nothing is saved, because {reason}"
    if loop.finished:
        return f"saved at step {max(steps)}; the run is complete"
    return f"saved at step {max(steps)}; run the same command to resume"


def _hide_traceback(error: KeyboardInterrupt) -> None:
    """Print no traceback for this error if nobody catches it, because it would look like a crash."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], raised: BaseException, traceback: Any) -> None:
        if raised is not error:
            previous(kind, raised, traceback)

    sys.excepthook = hook
