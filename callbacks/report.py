"""One page about a run: how it ended, its curves, its checkpoints, what it ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from onstep import Cadence, Callback, Loop, Record, page, plots, processes
from onstep.redact import redacted, without_secrets
from onstep.storage import Storage

MOST = 1000
"""Points kept of a name."""
PACKAGES = ("onstep", "jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")
TIMES = ("time/steps_per_second", "time/data", "time/callbacks")


class Report(Callback):
    """Writes one HTML file about a run at its end, whether it finished, was stopped or failed.

    It opens offline and holds no script: how the run ended, curves of all that was recorded, also
    before a resume, the last, lowest and highest values, where the time went (with `Timing`), the
    checkpoints (with `Checkpoint`), the configuration, versions and devices; no environment
    variables, arguments, or names of users and hosts. Of a name with more than 1,000 points every
    second is drawn, or every fourth, and so on.

    List it first: then it is the last to end, and knows what the others did at their end. A page
    that is there is replaced; a run that takes no step writes none.

    Args:
        path: the file, such as `"runs/digits/report.html"`.
        config: a dict, dataclass or pydantic model to show, with secrets redacted.
        when: when to write the page during the run as well; a plain int means steps.
        name: the callback's name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: Any = None,
        when: Cadence | int | None = None,
        name: str | None = None,
    ):
        self.path: str = os.path.abspath(path)
        self.name: str | None = name
        self.config: dict[str, Any] = {} if config is None else redacted(config)
        self.when: Cadence | int = Cadence() if when is None else when
        self._begun: float | None = None  # the time at which this sitting began
        self.set_state({"curves": {}, "seconds": 0.0, "sittings": 0, "spent": [0.0, 0.0, 0.0]})

    def on_run_begin(self, loop: Loop) -> None:
        self._begun, self._first, self._timed = time.monotonic(), loop.step, loop.step
        self._sittings += 1

    def on_log(self, loop: Loop, record: Record) -> None:
        for name, value in record.values.items():
            self._curves.setdefault(name, Curve()).add(record.step, value)
        if record.values.keys() >= set(TIMES):  # of the steps since the last such record
            rate, *shares = (record.values[name] for name in TIMES)
            seconds = (record.step - self._timed) / rate
            self._spent = [old + seconds * share for old, share in zip(self._spent, (1, *shares), strict=True)]
            self._timed = record.step

    def on_save(self, loop: Loop) -> None:
        self._write(loop)

    def on_run_end(self, loop: Loop) -> None:
        if loop.step > self._first:
            self._write(loop)

    def get_state(self) -> dict[str, Any]:
        curves = {
            name: vars(curve) | {"steps": np.asarray(curve.steps), "values": np.asarray(curve.values)}
            for name, curve in self._curves.items()
        }
        return {"curves": curves, "seconds": self._elapsed(), "sittings": self._sittings, "spent": self._spent}

    def set_state(self, state: dict[str, Any]) -> None:
        self._curves = {
            name: Curve(**curve | {"steps": curve["steps"].tolist(), "values": curve["values"].tolist()})
            for name, curve in state["curves"].items()
        }
        self._seconds, self._sittings, self._spent = state["seconds"], state["sittings"], state["spent"]

    def _elapsed(self) -> float:
        """Seconds, of this sitting and those before."""
        return self._seconds + (0 if self._begun is None else time.monotonic() - self._begun)

    def _write(self, loop: Loop) -> None:
        if not processes.writes():
            return
        text = page.page(_outcome(loop)[0], self._sections(loop)).encode(errors="xmlcharrefreplace")
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        aside = f"{self.path}.{uuid.uuid4().hex}"
        try:
            with open(aside, "wb") as file:
                file.write(text)
            os.replace(aside, self.path)
        finally:
            if os.path.exists(aside):
                os.unlink(aside)

    def _sections(self, loop: Loop) -> Iterator[str]:
        title, text, kind = _outcome(loop)
        facts = {
            "step": f"{loop.step:,}" + (f" of {loop.total:,}" if loop.total else ""),
            "epoch": f"{loop.epoch:,}" + (f" of {loop.epochs:,}" if loop.epochs else ""),
            "wall time": _duration(self._elapsed()),
            "sittings": f"{self._sittings}, the last from step {self._first:,}" if self._sittings > 1 else "",
            "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }
        yield page.heading(title, text, kind, facts)
        yield page.charts({name: curve.points() for name, curve in self._curves.items()})
        columns = "name", "last", "lowest", "at step", "highest", "at step", "not finite"
        names = [name for group in plots.grouped(self._curves).values() for name in group]
        yield page.table("Values", columns, [(name, *self._curves[name].row()) for name in names])
        yield page.table("Time", ("part", "seconds", "%"), self._times())
        callback: Any
        for callback in loop.callbacks.values():
            if all(hasattr(callback, name) for name in ("directory", "keep", "best", "mode")):  # as Checkpoint has
                storage = Storage(callback.directory, None, callback.best, callback.mode)
                title = f"Checkpoints in {os.path.basename(storage.directory)}"
                yield page.table(title, ("step", "MB", storage.best or "", ""), _checkpoints(storage))
        yield page.table("Configuration", ("name", "value"), [(key, str(value)) for key, value in self.config.items()])
        yield page.table("Environment", ("name", "value"), _environment(loop))

    def _times(self) -> Iterator[tuple[str, float, float]]:
        measured, data, others = self._spent
        if measured:
            rest = max(0.0, self._elapsed() - measured)
            parts = {
                "steps": measured - data - others,
                "waiting for data": data,
                "callbacks": others,
                "not measured: compiling, beginnings, ends": rest,
            }
            for part, spent in parts.items():
                yield part, round(spent, 2), round(100 * spent / (measured + rest), 1)


@dataclass
class Curve:
    """A name's points, thinned evenly and by their number alone; the last one and the extremes."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    every: int = 1  # one point of so many is kept
    count: int = 0
    bad: int = 0  # values that are not finite
    last: Sequence[Any] = ()  # a step and a value
    low: Sequence[Any] = ()
    high: Sequence[Any] = ()

    def add(self, step: int, value: float) -> None:
        """Takes a new point."""
        if self.count % self.every == 0:
            self.steps.append(step)
            self.values.append(value)
        if len(self.steps) > MOST:
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
        """The steps and values to draw, up to the last."""
        newest = (self.count - 1) % self.every == 0  # whether it is among those kept
        return (self.steps, self.values) if newest else ([*self.steps, self.last[0]], [*self.values, self.last[1]])

    def row(self) -> tuple[Any, ...]:
        """The last value; the lowest and the highest, with their steps; how many are not finite."""
        (low_step, low), (high_step, high) = self.low or ("", ""), self.high or ("", "")
        return self.last[1], low, low_step, high, high_step, self.bad or ""


def _outcome(loop: Loop) -> tuple[str, str, str]:
    """In a few words, why, and whether it is good or bad."""
    error, at = loop.error, f"at step {loop.step:,}"
    if error is not None and (isinstance(error, Exception) or loop.stopped is None):
        said = without_secrets("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        return f"{'Failed' if isinstance(error, Exception) else 'Interrupted'} {at}", said, "bad"
    if loop.stopped is not None:
        return f"Stopped {at}", without_secrets(loop.stopped) + ("" if loop.finished else " (to be resumed)"), ""
    if loop.over:
        return f"Finished {at}", "The run reached its target.", "good"
    return f"Running, {at}", "This page was written during the run.", ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _checkpoints(storage: Storage) -> Iterator[tuple[Any, ...]]:
    best = storage.best_step() if storage.best else None
    for step in storage.steps():
        try:
            manifest = storage.manifest(step)
            size = sum(size for size, _ in manifest["files"].values()) / 1e6
            yield step, float(f"{size:.3g}"), manifest["metrics"].get(storage.best, ""), "best" if step == best else ""
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
