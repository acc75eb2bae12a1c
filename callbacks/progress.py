"""Show how far a run is."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from onstep import Callback, Loop, every


class Progress(Callback):
    """A progress bar in a terminal or notebook, by tqdm; elsewhere a line per interval.

    Shows epoch, step, remaining time, rate and the newest metrics, as many as fit; rate and
    remaining time count from where a resumed run goes on.

    Args:
        interval: seconds between two updates; by default 0.2 for a bar, 10 for lines.
        metrics: the recorded names to show, in order; without, all but the `epoch/` means, and
            those of evaluations before those of training.
        file: where to; stderr without.
        name: the callback's name.

    Raises:
        ValueError: `interval` is not positive.
    """

    def __init__(
        self,
        *,
        interval: float | None = None,
        metrics: Sequence[str] | None = None,
        file: TextIO | None = None,
        name: str | None = None,
    ):
        self.metrics, self.name = metrics, name
        self._file = file
        self._bar: Any = None
        if interval is None:
            interval = 0.2 if self._is_terminal() or _in_notebook() else 10.0
        self.when = every(seconds=interval)

    def on_run_begin(self, loop: Loop) -> None:
        self._first, self._begun = loop.step, time.monotonic()
        if not loop.over:
            self._bar = self._new_bar(loop.step, loop.total)

    def on_step_end(self, loop: Loop) -> None:
        self._show(loop)

    def on_run_end(self, loop: Loop) -> None:
        if loop.step > self._first:
            self._show(loop)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, loop: Loop) -> None:
        epoch = f"epoch {loop.epoch}" + ("" if loop.epochs is None else f"/{loop.epochs}")
        names = self.metrics
        if names is None:
            shown = [name for name in loop.latest if not name.startswith(("epoch/", "time/"))]
            names = sorted(shown, key=lambda name: name.startswith("train/"))
        values = [f"{name} {loop.latest[name]:#.4g}" for name in names if name in loop.latest]
        if self._bar is None:
            print(self._line(loop, epoch, ", ".join(values)), file=self._file or sys.stderr, flush=True)
            return
        self._bar.n = loop.step
        self._bar.set_description_str(epoch, refresh=False)
        self._bar.set_postfix_str("", refresh=False)
        room = shutil.get_terminal_size().columns - len(str(self._bar))
        while values and len(", ".join(values)) + 3 > room and not _in_notebook():
            values.pop()  # a whole one: none is cut off
        self._bar.set_postfix_str(", ".join(values), refresh=False)
        self._bar.refresh()

    def _line(self, loop: Loop, epoch: str, values: str) -> str:
        rate = (loop.step - self._first) / max(time.monotonic() - self._begun, 1e-9)
        parts = [f"step {loop.step}" + ("" if loop.total is None else f"/{loop.total}"), epoch, f"{rate:.3g} steps/s"]
        if loop.total is not None and not loop.over:
            minutes, seconds = divmod(round((loop.total - loop.step) / rate), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join([*parts, values]).rstrip()

    def _is_terminal(self) -> bool:
        return bool(getattr(self._file or sys.stderr, "isatty", lambda: False)())

    def _new_bar(self, step: int, total: int | None) -> Any:
        if _in_notebook():
            from tqdm.notebook import tqdm
        elif self._is_terminal():
            from tqdm.std import tqdm
        else:
            return None

        class Bar(tqdm):  # type: ignore[misc, valid-type]
            monitor_interval = 0  # tqdm's watching thread would outlive the run

        known = "{desc} {n_fmt}/{total_fmt} |{bar:16}| {remaining} left, {rate_fmt}{postfix}"
        form = "{desc} {n_fmt} steps, {rate_fmt}{postfix}" if total is None else known
        form = None if _in_notebook() else form  # there the bar is a widget of its own
        return Bar(initial=step, total=total, unit=" steps", bar_format=form, mininterval=0, file=self._file)


def _in_notebook() -> bool:
    return "ipykernel.zmqshell" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
