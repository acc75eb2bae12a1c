"""Write one HTML page about a run: how it ended, its curves, its checkpoints, and the hardware and versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from onstep import Cadence, Callback, Loop, Record, plots, processes
from onstep.redact import redacted, without_secrets
from onstep.storage import Checkpoints
from onstep.tools import local_file

from ._support import page

MAX_POINTS = 1000
"""Points kept of each curve."""
PACKAGES = ("onstep", "jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")
TIMES = ("time/steps_per_second", "time/data", "time/callbacks")
"""The records from which the page shows where the time went: steps per second, and the shares of data and callbacks.

`Timing` documents these names, and any callback may log them.
"""
COMPILING = "time/compiling"
"""A record of the seconds spent compiling since the previous one. The page shows their sum, if there are any."""
UNITS = {"time/data": "share of the time", "time/callbacks": "share of the time", "time/mfu": "share of the peak"} | {
    COMPILING: "seconds"
}
"""The units of records whose names do not say them."""


class Report(Callback):
    """Writes one HTML file about a run at its end, whether it finished, was stopped or failed.

    The page opens offline and has no scripts. It shows how the run ended; curves of everything that was recorded,
    including before a resume; last, lowest and highest values; where the time went; the checkpoints (with
    `Checkpoint`); the configuration, versions and devices. It shows no environment variables, command-line arguments,
    user names or host names. A curve keeps at most 1,000 points: every second one is drawn, or every fourth, and so on.

    Where the time went is computed from the records `time/steps_per_second`, `time/data`, `time/callbacks` and
    `time/compiling`, which `Timing` logs with the training metrics. Without these records the page leaves it out.

    The title names the run after the file, or after its folder if the file is called `report.html` or `index.html`.

    List it first. Callbacks end in reverse order, so it then writes its page when all others have ended. An existing
    page is replaced; a run that takes no step writes none.

    Args:
        path: the file, such as `"runs/digits/report.html"`.
        config: a dict, dataclass or pydantic model to show, with secrets redacted.
        when: when to write the page during the run as well; a plain int means steps, None only at the end.
        name: the callback's name.

    Raises:
        TypeError: `config` is something else.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> directory = tempfile.TemporaryDirectory()
    >>> report = Report(os.path.join(directory.name, "report.html"), config={"learning_rate": 0.1})
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}), [report])
    >>> _ = engine.run(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1)
    >>> with open(report.path) as file:
    ...     "Finished at step 3" in file.read()
    True
    >>> directory.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: Any = None,
        when: Cadence | int | None = Cadence(),  # noqa: B008 (frozen)
        name: str | None = None,
    ):
        self.path: str = local_file("Report", path)
        self.config: dict[str, Any] | None = None if config is None else redacted(config)
        self.when: Cadence | int = Cadence() if when is None else when
        self.name: str | None = name
        self._began: float | None = None  # when this session began
        self.set_state({"curves": {}, "seconds": 0.0, "sessions": 0, "spent": [0.0, 0.0, 0.0], "compiling": 0.0})

    def on_run_begin(self, loop: Loop) -> None:
        self._began, self._timed = time.monotonic(), loop.step
        self._sessions += 1

    def on_log(self, loop: Loop, record: Record) -> None:
        self._add([record])
        if record.values.keys() >= set(TIMES):  # they cover the steps since the last such record
            rate, *shares = (record.values[name] for name in TIMES)
            seconds = (record.step - self._timed) / rate
            self._spent = [old + seconds * share for old, share in zip(self._spent, (1, *shares), strict=True)]
            self._timed = record.step
        self._compiling += record.values.get(COMPILING, 0.0)

    def on_save(self, loop: Loop) -> None:
        self._write_run(loop)

    def on_run_end(self, loop: Loop) -> None:
        if loop.step > loop.start_step:
            self._write_run(loop)

    def get_state(self) -> dict[str, Any]:
        curves = {
            name: vars(curve) | {"steps": np.asarray(curve.steps), "values": np.asarray(curve.values)}
            for name, curve in self._curves.items()
        }
        return {
            "curves": curves,
            "seconds": self._elapsed(),
            "sessions": self._sessions,
            "spent": self._spent,
            "compiling": self._compiling,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._curves = {
            name: Curve(**curve | {"steps": curve["steps"].tolist(), "values": curve["values"].tolist()})
            for name, curve in state["curves"].items()
        }
        self._seconds, self._spent = state["seconds"], state["spent"]
        self._compiling: float = state.get("compiling", 0.0)  # not in version 0.1
        self._sessions: int = state["sittings"] if "sittings" in state else state["sessions"]  # version 0.1

    def _elapsed(self) -> float:
        """Return the seconds that the run has taken in all sessions."""
        return self._seconds + (0 if self._began is None else time.monotonic() - self._began)

    def write_saved(self, checkpoints: Checkpoints, saved: dict[str, Any], records: Iterable[Record] = ()) -> None:
        """Write the page of a run that is over or still going on, from what it has saved.

        The curves are those of the records, or else those of the run's own `Report`. Otherwise they are the latest
        values at the step of the checkpoint.

        Args:
            checkpoints: those of the run, of which one is intact.
            saved: what the newest intact one holds besides arrays.
            records: everything that was recorded, if it is known.
        """
        for kept in saved["callbacks"].values():
            if isinstance(kept, dict) and kept.keys() >= {"curves", "seconds", "spent"}:
                self.set_state(kept)
        if records := [*records] or ([] if self._curves else [Record(saved["step"], saved["epoch"], saved["latest"])]):
            self._curves = {}
        self._add(records)
        facts = {
            "step": f"{saved['step']:,}",
            "epoch": f"{saved['epoch']:,}",
            "wall time": _duration(self._seconds) if self._seconds else "",
            "sessions": str(self._sessions or ""),
        }
        config = checkpoints.manifest(saved["step"]).get("config") or {}
        self._write(_saved_outcome(saved), facts, [checkpoints], {"Callbacks": (config.get("callbacks") or {}).items()})

    def _add(self, records: Iterable[Record]) -> None:
        for record in records:
            for name, value in record.values.items():
                self._curves.setdefault(name, Curve()).add(record.step, value)

    def _write_run(self, loop: Loop) -> None:
        """Write the page of a run that this callback belongs to."""
        if not processes.writes():
            return
        facts = {
            "step": f"{loop.step:,}" + (f" of {loop.total:,}" if loop.total else ""),
            "epoch": f"{loop.epoch:,}" + (f" of {loop.epochs:,}" if loop.epochs else ""),
            "wall time": _duration(self._elapsed()),
            "sessions": f"{self._sessions}, the last from step {loop.start_step:,}" if self._sessions > 1 else "",
        }
        config = [(name, str(value)) for name, value in (self.config or {}).items()]
        tables = {"Configuration": config, "Environment": _environment(loop)}
        self._write(_outcome(loop), facts, loop.checkpoints, tables)

    def _write(
        self,
        outcome: tuple[str, str, str],
        facts: dict[str, str],
        saved: Iterable[Checkpoints],
        tables: dict[str, Iterable[tuple[str, str]]],
    ) -> None:
        """Write the page.

        Args:
            outcome: how the run ended, why, and whether that is good or bad.
            facts: what to show at the top, by name.
            saved: the checkpoints of the run.
            tables: names and values to show at the end, by title.
        """
        facts = {"run": _run_name(self.path), **facts, "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        columns = "name", "last", "lowest", "at step", "highest", "at step", "not finite"
        names = [name for group in plots.group_by_chart(self._curves).values() for name in group]
        parts = [
            page.heading(*outcome, facts),
            page.charts({name: curve.points() for name, curve in self._curves.items()}, UNITS),
            page.table("Values", columns, [(_with_unit(name), *self._curves[name].row()) for name in names]),
            page.table("Time", ("part", "seconds", "%"), self._times()),
        ]
        for checkpoints in saved:
            title = f"Checkpoints in {os.path.basename(checkpoints.directory)}"
            parts.append(page.table(title, ("step", "MB", checkpoints.best or "", ""), _checkpoints(checkpoints)))
        parts += [page.table(title, ("name", "value"), rows) for title, rows in tables.items()]
        text = page.page(f"{_run_name(self.path)}: {outcome[0]}", parts).encode(errors="xmlcharrefreplace")
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        temporary = f"{self.path}.{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as file:
                file.write(text)
            os.replace(temporary, self.path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def _times(self) -> Iterator[tuple[str, float, float]]:
        measured, data, others = self._spent
        if measured:
            rest = max(0.0, self._elapsed() - measured - self._compiling)
            parts = {
                "steps": measured - data - others,
                "waiting for data": data,
                "callbacks": others,
                "compiling": self._compiling,
                "not measured: start, end" if self._compiling else "not measured: compiling, start, end": rest,
            }
            for part, spent in parts.items():
                if spent or part != "compiling":
                    yield part, round(spent, 2), round(100 * spent / sum(parts.values()), 1)


@dataclass
class Curve:
    """The points of one curve, thinned evenly, with the last one and the extremes.

    Which points are kept depends only on their number, so a resumed run keeps the same ones.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    every: int = 1  # one of `every` points is kept
    count: int = 0
    bad: int = 0  # number of values that are not finite
    last: Sequence[Any] = ()  # step and value
    low: Sequence[Any] = ()
    high: Sequence[Any] = ()

    def add(self, step: int, value: float) -> None:
        """Add a point."""
        if self.count % self.every == 0:
            self.steps.append(step)
            self.values.append(value)
        if len(self.steps) > MAX_POINTS:
            del self.steps[1::2], self.values[1::2]
            self.every *= 2
        self.count += 1
        self.last = step, value
        self.bad += not math.isfinite(value)
        if math.isfinite(value) and (not self.low or value < self.low[1]):
            self.low = self.last
        if math.isfinite(value) and (not self.high or value > self.high[1]):
            self.high = self.last

    def points(self) -> page.Points:
        """Return the steps and values to draw, the last ones included."""
        newest = (self.count - 1) % self.every == 0  # whether the last point was kept
        return (self.steps, self.values) if newest else ([*self.steps, self.last[0]], [*self.values, self.last[1]])

    def row(self) -> tuple[Any, ...]:
        """Return the last value, the lowest and the highest with their steps, and how many are not finite."""
        (low_step, low), (high_step, high) = self.low or ("", ""), self.high or ("", "")
        return self.last[1], low, low_step, high, high_step, self.bad or ""


def _run_name(path: str) -> str:
    """Return what the page calls the run: the name of the file, or of its folder if that of the file says nothing.

    >>> _run_name("/runs/digits/report.html"), _run_name("/runs/digits.html")
    ('digits', 'digits')
    """
    folder, name = os.path.split(os.path.splitext(path)[0])
    return (os.path.basename(folder) or name) if name.lower() in ("report", "index") else name


def _with_unit(name: str) -> str:
    return f"{name} ({UNITS[name]})" if name in UNITS else name


def _outcome(loop: Loop) -> tuple[str, str, str]:
    """Return how the run ended, why, and whether that is good or bad."""
    error, at = loop.error, f"at step {loop.step:,}"
    if error is not None and (isinstance(error, Exception) or loop.stopped is None):
        said = without_secrets("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        return f"{'Failed' if isinstance(error, Exception) else 'Interrupted'} {at}", said, "bad"
    if loop.stopped is not None:
        return f"Stopped {at}", without_secrets(loop.stopped) + ("" if loop.finished else " (resumable)"), ""
    if loop.over:
        return f"Finished {at}", "The run reached its target.", "good"
    return f"Running, {at}", "This page was written during the run.", ""


def _saved_outcome(saved: dict[str, Any]) -> tuple[str, str, str]:
    """Return how a run ended as far as its newest checkpoint says, why, and whether that is good or bad."""
    at = f"at step {saved['step']:,}"
    if saved["stopped"] is not None:
        return f"Stopped {at}", without_secrets(saved["stopped"]) + ("" if saved["final"] else " (resumable)"), ""
    if saved.get("finished"):  # not in version 0.1
        return f"Finished {at}", "The run reached its target.", "good"
    return f"Saved {at}", "The run goes on from here, or it was interrupted.", ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _checkpoints(checkpoints: Checkpoints) -> Iterator[tuple[Any, ...]]:
    best = checkpoints.best_step() if checkpoints.best else None
    for step in checkpoints.steps():
        try:
            manifest = checkpoints.manifest(step)
            megabytes = float(f"{sum(size for size, _ in manifest['files'].values()) / 1e6:.3g}")
            value = manifest["metrics"].get(checkpoints.best, "")
            yield step, megabytes, value, "best" if step == best else ""
        except (OSError, ValueError):
            yield step, "", "", "damaged"


def _environment(loop: Loop) -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
    devices = Counter(device.device_kind for device in jax.devices())
    yield "devices", ", ".join(f"{count} x {kind}" for kind, count in devices.items())
    if jax.process_count() > 1:
        yield "processes", str(jax.process_count())
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "callbacks", ", ".join(loop.callbacks)
