"""Show the progress of a run."""

from __future__ import annotations

import functools
import html
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TextIO

from onstep import Cadence, Callback, Loop, Record, every, processes
from onstep.tools import Observer, check_list, print_text, warn_missing_metric

from ._support.terminal import MovingLines, is_terminal


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

    Args:
        interval: seconds between two updates, 0.2 for a bar and 10 for lines by default.
        metrics: the recorded names to show, in order. By default all except the `epoch/` means and the `time/` rates,
            with those of evaluations before those of training. A bar shows as many as fit.
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
        self.set_state({"steps": 0, "seconds": 0.0, "elapsed": 0.0, "evaluating": 0.0, "until": 0, "since": None})

    def on_run_begin(self, loop: Loop) -> None:
        self._loop, self._began, self._first = loop, time.monotonic(), loop.step
        if self._spent["since"] is None:
            self._spent["since"] = loop.step
        self._shown, self._beside, self._paused, self._ended = self._began, None, 0.0, False
        if processes.writes() and not loop.over:
            self._to = self._screen()(self.file or sys.stderr)  # shows nothing yet: other notices come first
        self._tasks = {}
        loop.observe(_Reports(functools.partial(self._report, loop)))

    def on_epoch_begin(self, loop: Loop) -> None:
        self._check_metrics(loop)

    def on_step_end(self, loop: Loop) -> None:
        if not loop.over:  # on_run_end shows the last step
            self._show(loop)

    def on_log(self, loop: Loop, record: Record) -> None:
        self._check_metrics(loop, record)
        if self._paused:  # by an evaluation, which has ended with this record
            self._spent["evaluating"] += self._paused
            self._spent["until"], self._paused = loop.step, 0.0
        if self._beside is not None:
            self._beside = None
            if self._to is not None and self._to.moves:
                self._show(loop)

    def on_epoch_end(self, loop: Loop) -> None:
        if not loop.over:  # otherwise on_run_end follows
            self._check_metrics(loop)

    def on_run_end(self, loop: Loop) -> None:
        self._beside, self._ended = None, True
        if loop.step > self._first:
            self._show(loop)
        if self._to is not None:
            self._to.close()
        self._loop = self._to = None
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
        if done > task.first and self._to is not None and now - max(task.began, self._shown) >= self._interval:
            facts = [f"{done}"]
            if total is not None:
                each = (now - task.began) / (done - task.first)
                facts = [f"{done}/{total}", f"{_clock((total - done) * each)} left"]
            self._beside = Part(name, total and done / total, facts)
            self._show(loop)

    def _show(self, loop: Loop) -> None:
        if self._to is None:
            return
        self._shown = time.monotonic()
        self._mark = self._mark or (self._shown, loop.step)
        self._to.draw(self._run(loop), self._beside)

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
            facts.append(_rate(spent["steps"] / stepping))
            a_step = stepping / spent["steps"] + spent["evaluating"] / max(spent["until"] - spent["since"], 1)
            if total is not None and not self._ended:
                facts.append(f"{_clock((total - loop.step) * a_step)} left")
        if self._ended:
            facts.append(f"in {_clock(spent['elapsed'])}")
        names = self.metrics
        if names is None:
            shown = [name for name in loop.latest if not name.startswith(("epoch/", "time/"))]
            names = sorted(shown, key=lambda name: name.startswith("train/"))
        values = [f"{name} {loop.latest[name]:#.4g}" for name in names if name in loop.latest]
        return Part(f"epoch {epoch}" + ("" if loop.epochs is None else f"/{loop.epochs}"), share, facts, values)

    def _screen(self) -> type[_Lines]:
        if self.file is None and "ipykernel.zmqshell" in sys.modules:
            return _Notebook
        return _Terminal if is_terminal(self.file or sys.stderr) and os.environ.get("TERM") != "dumb" else _Lines


class _Reports(Observer):
    """Passes the reports of callbacks on. It overrides neither `begin` nor `end`, so it costs the steps nothing."""

    def __init__(self, report: Callable[[str, int, int | None], None]):
        self._report = report

    def progress(self, name: str, done: int, total: int | None) -> None:
        self._report(name, done, total)


@dataclass
class _Task:
    """A task that a callback reports."""

    began: float  # the time of its first report
    first: int  # the units done at that time
    last: float  # the time of its last report
    done: int  # the units done at that time


@dataclass(frozen=True)
class Part:
    """The content of one line."""

    label: str
    share: float | None  # of the bar that is filled, None for no bar
    facts: list[str]
    values: list[str] = field(default_factory=list)  # a bar shows as many of them as fit


class _Lines:
    moves = False

    def __init__(self, file: TextIO):
        self._file = file

    def draw(self, run: Part, beside: Part | None) -> None:
        texts = [run.label, *run.facts, ", ".join(run.values)]
        if beside is not None:
            texts = [run.label, run.facts[0], f"{beside.label} {', '.join(beside.facts)}"]
        print_text("  ".join(texts).rstrip(), self._file)

    def close(self) -> None:
        pass


class _Terminal(_Lines):
    moves = True

    def __init__(self, file: TextIO):
        super().__init__(file)
        self._shown = MovingLines(file)

    def draw(self, run: Part, beside: Part | None) -> None:
        try:
            columns = os.get_terminal_size(self._file.fileno()).columns
        except (AttributeError, OSError):
            columns = shutil.get_terminal_size().columns
        smooth = "utf" in (getattr(self._file, "encoding", None) or "").lower()
        self._shown.draw(_lines([part for part in (run, beside) if part is not None], columns or 80, smooth))

    def close(self) -> None:
        self._shown.close()


class _Notebook(_Lines):
    moves = True
    _handle: Any = None

    def draw(self, run: Part, beside: Part | None) -> None:
        from IPython.display import display

        parts = [part for part in (run, beside) if part is not None]
        page = {
            "text/plain": "\n".join(_lines(parts, 100, smooth=True)),
            "text/html": "".join(map(_html, parts)),
        }
        if self._handle is None:
            self._handle = display(page, raw=True, display_id=True)
        else:
            self._handle.update(page, raw=True)


def _lines(parts: list[Part], columns: int, smooth: bool) -> list[str]:
    """Return a line for each part. If no value fits on the first line, its bar gets shorter."""
    first, pad = parts[0].values, max(len(part.label) for part in parts)
    for width in (columns // 10, 5):
        bars = ["  " if part.share is None else f" |{_bar(part.share, width, smooth)}| " for part in parts]
        lines = [f"{p.label:<{pad}}{bar}{'  '.join(p.facts)}" for p, bar in zip(parts, bars, strict=True)]
        choices = [lines[0], *(f"{lines[0]}  {', '.join(first[:n])}" for n in range(1, len(first) + 1))]
        lines[0] = [line for line in choices if len(line) < columns or line is choices[0]][-1]
        if not first or lines[0] is not choices[0]:
            break
    return [line[: columns - 1] for line in lines]


def _bar(share: float, width: int, smooth: bool) -> str:
    if not smooth:
        return ("#" * int(share * width)).ljust(width)
    full, eighths = divmod(int(share * width * 8), 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[eighths]).rstrip().ljust(width)


def _html(part: Part) -> str:
    bar = "" if part.share is None else f'<progress value="{part.share:.4f}" max="1"></progress>'
    text = html.escape("  ".join([*part.facts, ", ".join(part.values)]))
    return f'<div style="white-space: pre-wrap">{html.escape(part.label)} {bar} {text}</div>'


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _rate(rate: float) -> str:
    if rate < 1:
        return f"{1 / rate:#.3g} s/step"
    return f"{rate:#.3g} steps/s" if rate < 99.95 else f"{rate:,.0f} steps/s"
