"""Show the progress of a run."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TextIO

from onstep import Cadence, Callback, Loop, Record, every, processes
from onstep.tools import Activity, Observer, check_list, print_text, warn_missing_metric

from ._support.layout import Part, bars, clock, page, plain, rate
from ._support.terminal import MovingLines, is_terminal, terminal_columns, width
from ._support.watch import ActivityWatch

PATIENCE = 1.3
"""Seconds after a missed update before a line says what the run is doing instead."""


@dataclass(eq=False, repr=False)
class Progress(Callback):
    """Shows the progress of a run as a bar in a terminal or notebook, and as a line per interval in a log file.

        epoch 3/10 |████████| step 360/1200  35.2 steps/s  0:27 left  train/loss 0.3120
        val        |██████▍ | 96/120  0:02 left

    The bar shows the progress of the epoch, or that of the run if there is only one epoch or the length of an epoch
    is unknown. A task that a callback reports with `loop.progress`, such as an evaluation, is shown on its own
    line if it takes longer than `interval`. The rate is that of the steps: compile time and these tasks are excluded.
    The remaining time assumes that the tasks continue to take the same share of the time. Both cover the whole run,
    including the steps before a resume. If there are several processes, only the first one prints.

    Whatever else is printed appears above the bar. If the bar cannot move for more than a second, a line below it says
    what the run is doing, such as compiling, restoring or saving a checkpoint, or reading the data, and for how long.
    A log file gets such a line after `interval`, and then twice as rarely each time.

    Args:
        interval: seconds between two updates, 0.2 for a bar and 10 for lines by default.
        metrics: the recorded names to show, in order. By default all except the `epoch/` means and the `time/` rates,
            with those of evaluations before those of training. A bar shows as many as fit: these metrics, or the
            losses by default, are left out last.
        epoch_lines: True leaves a line for each epoch on the screen, with the means of training and the metrics of
            evaluations side by side. A log file then gets only these lines:

                epoch 3/20  loss 0.1234  accuracy 0.9510  val/loss 0.2001  val/accuracy 0.9444  1.2 s

        file: where to print; stderr by default.
        name: the callback's name.

    Raises:
        ValueError: `interval` is not positive, or `metrics` is one string.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> progress = Progress(file=sys.stdout)
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}), [progress])
    >>> result = engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
    epoch 2/2  step 6/6  ...  train/loss 2.000
    """

    _: KW_ONLY
    interval: float | None = None
    metrics: Sequence[str] | None = None
    epoch_lines: bool = False
    file: TextIO | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_list("Progress", "metrics", self.metrics)
        default = 0.2 if self._screen().moves else 10.0
        self._interval = default if self.interval is None else self.interval
        if not (isinstance(self._interval, (int, float)) and self._interval > 0):
            raise ValueError(f"Progress needs interval > 0 in seconds, got {self.interval!r}.")
        self.when: Cadence | int = every(seconds=self._interval)
        self._tasks: dict[str, _Task] = {}
        self._loop: Loop | None = None
        self._to: _Lines | None = None
        self._watch: ActivityWatch | None = None
        self.set_state({"steps": 0, "seconds": 0.0, "elapsed": 0.0, "evaluating": 0.0, "until": 0, "since": None})

    def observer(self, loop: Loop) -> Observer | None:
        self._line, self._beside, self._tasks, self._ended = None, None, {}, False
        self._shown, self._paused = time.monotonic(), 0.0  # a callback may report a task when it loads
        if processes.writes():
            self._to = to = self._screen()(self.file or sys.stderr)  # shows nothing yet
            if to.moves or not self.epoch_lines:
                self._watch = ActivityWatch(self._tell, self._interval + PATIENCE, rarely=not to.moves)
        return _Reports(functools.partial(self._report, loop), self._close)

    def on_run_begin(self, loop: Loop) -> None:
        self._loop, self._began, self._first = loop, time.monotonic(), loop.step
        if self._spent["since"] is None:
            self._spent["since"] = loop.step
        self._shown = self._epoch_began = self._began
        self._paused, self._recorded, self._completed, self._printed = 0.0, {}, 0, -1
        self._mark, self._beside = None, None
        if not loop.over:
            self._line = self._run(loop)

    def on_epoch_begin(self, loop: Loop) -> None:
        self._print_epoch(loop)  # now that everything due at its end has been recorded
        self._epoch_began = time.monotonic()
        self._check_metrics(loop)

    def on_step_end(self, loop: Loop) -> None:
        if not loop.over:  # on_run_end shows the last step
            self._show(loop)

    def on_log(self, loop: Loop, record: Record) -> None:
        self._check_metrics(loop, record)
        self._recorded.update(record.values)
        if self._paused:  # by an evaluation, which has ended with this record
            self._spent["evaluating"] += self._paused
            self._spent["until"], self._paused = loop.step, 0.0
        if self._beside is not None:
            self._beside = None
            if self._to is not None and self._to.moves:
                self._show(loop)

    def on_epoch_end(self, loop: Loop) -> None:
        self._completed = loop.epoch
        if not loop.over:  # otherwise on_run_end follows
            self._check_metrics(loop)

    def on_run_end(self, loop: Loop) -> None:
        self._beside, self._ended = None, True
        self._print_epoch(loop)
        if self._to is not None:
            with self._to.lock:  # otherwise the other thread could draw in between
                if loop.step == self._first or (self.epoch_lines and self._printed == loop.step):
                    self._to.clear()
                else:
                    self._show(loop, last=True)
                    self._to.leave()
                self._line = None
        self._loop = None
        self._check_metrics(loop)

    def evaluating(self, loop: Loop, name: str) -> Callable[[int, int | None], None]:
        """Show an evaluation that begins now. Deprecated since 0.2: use `functools.partial(loop.progress, name)`.

        Args:
            loop: the run.
            name: what the line calls the evaluation.

        Returns:
            A function to call after each batch with the number of batches done and their total (None if unknown),
            as in `evaluate(..., watch=progress.evaluating(loop, "test"))`.
        """
        warnings.warn(
            "Progress.evaluating is deprecated since onstep 0.2. Use functools.partial(loop.progress, name) instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        loop.progress(name, 0)
        return functools.partial(loop.progress, name)

    def get_state(self) -> dict[str, Any]:
        spent = dict(self._spent)
        if self._loop is not None:
            now, step = time.monotonic(), self._loop.step
            since, first = self._mark or (now, step)
            spent["steps"] += step - first
            spent["seconds"] += now - since
            spent["elapsed"] += now - self._began
        return spent

    def set_state(self, state: dict[str, Any]) -> None:
        self._spent = state
        self._mark: tuple[float, int] | None = None  # the time and the step at which measuring the rate began

    def _check_metrics(self, loop: Loop, record: Record | None = None) -> None:
        for metric in self.metrics or ():
            warn_missing_metric("Progress", metric, loop, record)

    def _report(self, loop: Loop, name: str, done: int, total: int | None) -> None:
        """Handle a report of `loop.progress`, and show it if it is time to update."""
        now, task = time.monotonic(), self._tasks.get(name)
        if task is None or done <= task.done:  # it begins
            self._tasks[name] = task = _Task(now, done, now, done)
            self._mark = self._mark or (now, loop.step)
        self._paused += now - task.last
        task.last, task.done = now, done
        if self._watch is not None:
            self._watch.touch()
        if done > task.first and self._to is not None and now - max(task.began, self._shown) >= self._interval:
            facts = [f"{done}"]
            if total is not None:
                each = (now - task.began) / (done - task.first)
                facts = [f"{done}/{total}", f"{clock((total - done) * each)} left"]
            self._beside = Part(name, total and done / total, facts)
            self._show(loop)

    def _show(self, loop: Loop, last: bool = False) -> None:
        """Show the progress of the run; in a log file that gets a line for each epoch, only its last line."""
        self._shown = time.monotonic()
        self._mark = self._mark or (self._shown, loop.step)
        if self._to is None:
            return
        if self._watch is not None:
            self._watch.touch()
        if self._to.moves or not self.epoch_lines or last:
            with self._to.lock:
                self._line = self._run(loop)
                self._to.draw(self._line, self._beside)

    def _tell(self, activity: Activity | None, seconds: float) -> None:
        """Show what the run has been doing for some seconds instead of steps, or None. Called in another thread."""
        if (to := self._to) is None:
            return
        with to.lock:
            if to.covered():
                return
            beside = self._beside
            if activity is not None and beside is None and (to.moves or activity.what or activity.callback):
                beside = Part(self._describe(activity), None, [clock(seconds)])
            if to.moves and self._line is None and beside is None:
                to.clear()
            elif to.moves or beside is not None:
                to.draw(self._line, beside)

    def _describe(self, activity: Activity) -> str:
        """Return in words what the run is doing."""
        what = activity.what
        if activity.callback:
            return f"{what} ({activity.callback})" if what else f"running {activity.callback}.{activity.event}"
        if what in ("", "waiting for the device"):
            return "running steps" if self._line else "ending the run" if self._ended else "starting the run"
        return f"{what} ({activity.line})" if activity.line else what

    def _close(self) -> None:
        """End the other thread, and remove what is shown about the end of the run."""
        watch, to, self._watch, self._to = self._watch, self._to, None, None
        if watch is not None:
            watch.close()
        if to is not None:
            to.close()

    def _print_epoch(self, loop: Loop) -> None:
        """Print the line of the epoch that has been completed, if there is one."""
        epoch, values, self._completed, self._recorded = self._completed, self._recorded, 0, {}
        if not (self.epoch_lines and epoch):
            return
        self._printed = loop.step
        names = self.metrics
        if names is None:
            shown = [name for name in values if not name.startswith(("train/", "time/"))]
            names = sorted(shown, key=lambda name: not name.startswith("epoch/"))
        texts = [f"{name.removeprefix('epoch/')} {values[name]:#.4g}" for name in names if name in values]
        seconds = time.monotonic() - self._epoch_began
        number = f"{epoch}" if loop.epochs is None else f"{epoch:>{len(str(loop.epochs))}}/{loop.epochs}"
        if self._to is not None:
            took = f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
            self._to.keep("  ".join([f"epoch {number}", *texts]), took)

    def _run(self, loop: Loop) -> Part:
        epoch, length, total = loop.epoch + (loop.epoch_step > 0 or not loop.epoch), loop.epoch_length, loop.total
        share = loop.step / total if total else None
        if length is not None and (total is None or total > length):
            share = 1.0 if loop.epoch and not loop.epoch_step else loop.epoch_step / length
        facts = [f"step {loop.step}" + ("" if total is None else f"/{total}")]
        spent = self.get_state()
        if self._ended and not spent["steps"]:  # too short to be measured
            spent |= {"steps": loop.step - spent["since"], "seconds": spent["elapsed"]}
        stepping = spent["seconds"] - spent["evaluating"] - self._paused
        if spent["steps"] and stepping > 0:
            facts.append(rate(spent["steps"] / stepping))
            a_step = stepping / spent["steps"] + spent["evaluating"] / max(spent["until"] - spent["since"], 1)
            if total is not None and not self._ended:
                facts.append(f"{clock((total - loop.step) * a_step)} left")
        if self._ended:
            facts.append(f"in {clock(spent['elapsed'])}")
        names = self.metrics
        if names is None:
            shown = [name for name in loop.latest if not name.startswith(("epoch/", "time/"))]
            names = sorted(shown, key=lambda name: name.startswith("train/"))
        names = [name for name in names if name in loop.latest]
        values = [f"{name} {loop.latest[name]:#.4g}" for name in names]
        label = f"epoch {epoch}" + ("" if loop.epochs is None else f"/{loop.epochs}")
        return Part(label, share, facts, values, range(len(names)) if self.metrics is not None else _losses(names))

    def _screen(self) -> type[_Lines]:
        if self.file is None and "ipykernel.zmqshell" in sys.modules:
            return _Notebook
        return _Terminal if is_terminal(self.file or sys.stderr) and os.environ.get("TERM") != "dumb" else _Lines


def _losses(names: Sequence[str]) -> list[int]:
    """Return the indices of the losses, those of training first; the first training metric if there is no loss."""
    training = sorted(range(len(names)), key=lambda i: not names[i].startswith("train/"))
    return [i for i in training if "loss" in names[i].rpartition("/")[2].lower()] or training[:1]


class _Reports(Observer):
    """Passes the reports of callbacks on. It overrides neither `begin` nor `end`, so it costs the steps nothing."""

    def __init__(self, report: Callable[[str, int, int | None], None], close: Callable[[], None]):
        self._report, self._close = report, close

    def close(self) -> None:
        self._close()

    def progress(self, name: str, done: int, total: int | None) -> None:
        self._report(name, done, total)


@dataclass
class _Task:
    """A task that a callback reports."""

    began: float  # the time of its first report
    first: int  # the units done at that time
    last: float  # the time of its last report
    done: int  # the units done at that time


class _Lines:
    """Prints lines below each other, as for a log file."""

    moves = False

    def __init__(self, file: TextIO):
        self.file = file
        self.lock = threading.RLock()  # held while something is drawn, because another thread draws as well

    def draw(self, run: Part | None, beside: Part | None) -> None:
        """Show the progress of the run, and what it is doing besides."""
        print_text(plain(run, beside), self.file)

    def keep(self, line: str, time: str) -> None:
        """Show a line that stays, with the time it is about if there is room."""
        print_text(f"{line}  {time}", self.file)

    def covered(self) -> bool:
        """Return whether the progress of a run inside this one is shown instead."""
        return False

    def leave(self) -> None:
        """Leave what is shown as it is from now on."""

    def clear(self) -> None:
        """Remove what is shown, except for what stays."""

    def close(self) -> None:
        """Remove what is shown, except for what stays. Nothing is drawn any more."""


class _Terminal(_Lines):
    moves = True

    def __init__(self, file: TextIO):
        super().__init__(file)
        self._lines = MovingLines(file)

    def draw(self, run: Part | None, beside: Part | None) -> None:
        smooth = "utf" in (getattr(self.file, "encoding", None) or "").lower()
        parts = [part for part in (run, beside) if part is not None]
        self._lines.draw(bars(parts, terminal_columns(self.file), smooth))

    def keep(self, line: str, time: str) -> None:
        whole = f"{line}  {time}"
        print_text(whole if width(whole) <= terminal_columns(self.file) else line, self.file)

    def covered(self) -> bool:
        return not self._lines.newest

    def leave(self) -> None:
        self._lines.leave()

    def clear(self) -> None:
        self._lines.clear()

    def close(self) -> None:
        self._lines.close()


class _Notebook(_Lines):
    """One output of the cell that is updated. It stays above what the cell prints."""

    moves = True

    def __init__(self, file: TextIO):
        super().__init__(file)
        self._handle: Any = None
        self._drawn: list[Part] = []
        self._left: list[Part] = []

    def draw(self, run: Part | None, beside: Part | None) -> None:
        self._update([*self._left, *(part for part in (run, beside) if part is not None)])

    def keep(self, line: str, time: str) -> None:
        print_text(f"{line}  {time}", sys.stdout)

    def leave(self) -> None:
        self._left = self._drawn

    def clear(self) -> None:
        if self._drawn != self._left:
            self._update(self._left)

    def close(self) -> None:
        self.clear()

    def _update(self, parts: list[Part]) -> None:
        from IPython.display import display

        self._drawn = parts
        shown = {"text/plain": "\n".join(bars(parts, 100, smooth=True)), "text/html": page(parts)}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
