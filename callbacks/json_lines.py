"""Write records as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any, TextIO

from onstep import Callback, History, Loop, Record, processes, sinks
from onstep.redact import redacted


class JSONLines(Callback):
    """Writes every record as one line of strict JSON, at once.

        {"step": 50, "epoch": 0, "time": 1795176834.4, "train/loss": 0.3}

    NaN and infinities, for which JSON has no numbers, are the texts "NaN", "Infinity" and "-Infinity",
    which `float` in Python and `Number` in JavaScript read. A run that goes on cuts away the lines
    beyond its step, so no point is there twice. A fresh run moves a file that is there aside, to
    `<name>.1.jsonl`, and says so. No file is made before the first record.

    Args:
        path: of the file.
        config: a dict, dataclass or pydantic model for a line `{"config": {...}}`, flat, with secrets
            redacted; again where a run goes on with another one.
        name: the callback's name.

    Raises:
        ValueError: a record holds a name that the line itself needs; or a line of the file is no record.
    """

    def __init__(self, path: str | os.PathLike[str], *, config: Any = None, name: str | None = None):
        self.path: str = os.path.abspath(path)
        self.name: str | None = name
        self.config: dict[str, Any] | None = None if config is None else redacted(config)
        self._file: TextIO | None = None

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        line = {"step": record.step, "epoch": record.epoch, "time": time.time()}
        if taken := sorted(line.keys() & record.values.keys()):
            raise ValueError(f"JSONLines needs {taken} for itself. Record these values under other names.")
        if self._file is None:
            lines = sinks.kept(loop, self.path, _step)
            if self.config is not None and (first := _line({"config": self.config})) not in lines:
                lines.append(first)
            self._file = sinks.rewrite(self.path, lines)
        self._file.write(_line(line | record.values))
        self._file.flush()

    def on_run_end(self, loop: Loop) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_json_lines(path: str | os.PathLike[str]) -> History:
    """The values in a file of `JSONLines`, of all its sittings, as `result.history` has those of one."""
    history = History()
    with open(path, encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            if "step" in values:
                step, epoch, _ = values.pop("step"), values.pop("epoch"), values.pop("time")
                history.add(Record(step, epoch, {name: float(value) for name, value in values.items()}))
    return history


def _line(values: dict[str, Any]) -> str:
    return json.dumps(_strict(values), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity, -Infinity
    return value


def _step(line: str) -> int:
    values = json.loads(line)
    return 0 if "config" in values else values["step"]
