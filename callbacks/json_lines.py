"""Write records as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import KW_ONLY, dataclass
from typing import Any

from onstep import Callback, History, Loop, Record, processes
from onstep.redact import redacted
from onstep.tools import RecordFile, local_file


@dataclass(eq=False, repr=False)
class JSONLines(Callback):
    """Writes every record as one line of strict JSON.

        {"step": 50, "epoch": 0, "time": 1795176834.4, "train/loss": 0.3}

    Use it to keep a run's records in a file that any program can read; `read_json_lines` returns them as a `History`.
    Each line is in the file when its event ends. JSON has no numbers for NaN and infinities, so they are written as the
    strings "NaN", "Infinity" and "-Infinity", which `float` in Python and `Number` in JavaScript read. `time` is in
    seconds since 1970.

    A resumed run removes lines beyond the step from which it resumes, so no point appears twice. A run from scratch
    renames an existing file to `<name>.1.jsonl`, and prints a notice. The file is created at the first record.

    Args:
        path: the file. If its directory does not exist, it is created.
        config: a dict, dataclass or pydantic model, written as one line `{"config": {...}}`, flat, with secrets
            redacted. A resumed run writes it again only if it has changed.
        name: the callback's name.

    Raises:
        ValueError: a value was logged as `step`, `epoch` or `time`, or the file has a line that is not a record.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "log.jsonl")
    ...     _ = Engine(counting_step, [JSONLines(path, config={"rate": 0.1})]).run(0, [1, 3], epochs=1)
    ...     print(path.read_text())
    {"config": {"rate": 0.1}}
    {"step": 2, "epoch": 1, "time": ..., "epoch/loss": 2.0}
    {"step": 2, "epoch": 1, "time": ..., "train/loss": 2.0}
    """

    path: str | os.PathLike[str]
    _: KW_ONLY
    config: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.config = None if self.config is None else redacted(self.config)
        self._file = RecordFile("JSONLines", self.path, step=_step, reserved=["step", "epoch", "time"])

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        self._file.check_names(record)
        if not self._file.is_open:
            lines = self._file.open(loop)
            self._known = [_known(line) for line in lines if _step(line) == loop.start_step]
            if self.config is not None and (first := _line({"config": self.config})) not in lines:
                self._file.append(first)
        line = _line({"step": record.step, "epoch": record.epoch, "time": time.time()} | record.values)
        if _known(line) not in self._known:  # a run that resumes at its target repeats its last record
            self._file.append(line)

    def on_run_end(self, loop: Loop) -> None:
        self._file.close()


def read_json_lines(path: str | os.PathLike[str]) -> History:
    """Read the file of `JSONLines`, and return the values of all its sessions as one `History`.

    `result.history` has only the values of its own session.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "log.jsonl")
    ...     _ = path.write_text('{"step": 50, "epoch": 0, "time": 1795176834.4, "train/loss": 0.25}')
    ...     read_json_lines(path)["train/loss"]
    [0.25]
    """
    history = History()
    with open(local_file("read_json_lines", path), encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            if "step" in values:
                step, epoch, _ = values.pop("step"), values.pop("epoch"), values.pop("time")
                history.add(Record(step, epoch, {name: float(value) for name, value in values.items()}))
    return history


def _line(values: dict[str, Any]) -> str:
    return json.dumps(_strict(values), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """Return the value with strings in place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity, -Infinity
    return value


def _known(line: str) -> dict[str, Any]:
    """Return what a line says, without the time."""
    return {name: value for name, value in json.loads(line).items() if name != "time"}


def _step(line: str) -> int:
    values = json.loads(line)
    return 0 if "config" in values else values["step"]
