"""Write records as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import KW_ONLY, dataclass

from onstep import Callback, Loop, Record, processes
from onstep.tools import RecordFile


@dataclass(eq=False, repr=False)
class CSV(Callback):
    """Writes one row per step to a CSV file, with all values that were recorded at the step.

    Use it to look at a run in a spreadsheet or with pandas. Each row is in the file when its step ends. The columns are
    `step`, `epoch`, and the recorded names in order of appearance. When a new name appears, the file is written
    again, and earlier rows are empty in its column. NaN and infinities are written as `nan`, `inf` and `-inf`, which
    numpy and pandas read.

    A resumed run removes rows beyond the step from which it resumes, so no row appears twice. A run from scratch
    renames an existing file to `<name>.1.csv`, and prints a notice. The file is created at the first record.

    Args:
        path: the file. If its directory does not exist, it is created.
        name: the callback's name.

    Raises:
        ValueError: a value was logged as `step` or `epoch`, or the file has a line that is not a row.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "log.csv")
    ...     _ = Engine(counting_step, [CSV(path)], log_every=1).run(0, [1, 3], epochs=1)
    ...     print(path.read_text())
    step,epoch,train/loss,epoch/loss
    1,0,1.0,
    2,1,3.0,2.0
    """

    path: str | os.PathLike[str]
    _: KW_ONLY
    name: str | None = None

    def __post_init__(self) -> None:
        self._file = RecordFile("CSV", self.path, step=_step, reserved=["step", "epoch"])

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        self._file.check_names(record)
        if not self._file.is_open:
            lines = self._file.open(loop)
            self._columns = _cells(lines[0]) if lines else ["step", "epoch"]
            self._row = dict(zip(self._columns, _cells(lines[-1]), strict=True)) if lines[1:] else {}
        same_step = self._row.get("step") == str(record.step)
        if not same_step:
            self._row = {"step": str(record.step), "epoch": str(record.epoch)}
        self._row |= {name: repr(value) for name, value in record.values.items()}
        new = [name for name in record.values if name not in self._columns]
        self._columns += new
        line = ",".join(self._row.get(name, "") for name in self._columns) + "\n"
        if new:
            rows = self._file.lines()[1 : -1 if same_step else None]
            wider = (row.rstrip("\n") + "," * len(new) + "\n" for row in rows)
            self._file.replace([_header(self._columns), *wider, line])
        elif same_step:
            self._file.replace_last(line)
        else:
            self._file.append(line)

    def on_run_end(self, loop: Loop) -> None:
        self._file.close()


def _header(columns: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(columns)
    return text.getvalue()


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]))


def _step(line: str) -> int:
    first = line.split(",")[0]
    return 0 if first == "step" else int(first)
