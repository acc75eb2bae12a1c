"""Write records as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
from typing import TextIO

from onstep import Callback, Loop, Record, processes, sinks


class CSV(Callback):
    """Writes one row per step with all that was recorded at it, at once.

    The columns are `step`, `epoch`, then the recorded names as they come; where a name is new the file
    is written anew, with the old rows empty in its column. NaN and infinities are `nan`, `inf` and
    `-inf`, which numpy and pandas read. Runs that go on, fresh runs and the first record are treated
    as by `JSONLines`: no row is there twice, and another run's file is moved aside.

    Args:
        path: of the file.
        name: the callback's name.

    Raises:
        ValueError: a record holds a name that the row itself needs; or a line of the file is no row.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None):
        self.path: str = os.path.abspath(path)
        self.name: str | None = name
        self._file: TextIO | None = None

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        row = {"step": str(record.step), "epoch": str(record.epoch)}
        if taken := sorted(row.keys() & record.values.keys()):
            raise ValueError(f"CSV needs {taken} for itself. Record these values under other names.")
        if self._file is None:
            lines = sinks.kept(loop, self.path, _step)
            self._columns = _cells(lines[0]) if lines else list(row)
            self._row = dict(zip(self._columns, _cells(lines[-1]), strict=True)) if lines[1:] else {}
            self._file = sinks.rewrite(self.path, lines)
            self._at = self._file.tell() - len("".join(lines[-1:]))
        again = self._row.get("step") == row["step"]
        if not again:
            self._row, self._at = row, self._file.tell()
        self._row |= {name: repr(value) for name, value in record.values.items()}
        new = [name for name in record.values if name not in self._columns]
        self._columns += new
        line = ",".join(self._row.get(name, "") for name in self._columns) + "\n"
        if new:
            self._file.seek(0)
            rows = self._file.readlines()[1 : -1 if again else None]
            self._file.close()
            longer = (row.rstrip("\n") + "," * len(new) + "\n" for row in rows)
            self._file = sinks.rewrite(self.path, [_header(self._columns), *longer, line])
            self._at = self._file.tell() - len(line)
        else:
            self._file.seek(self._at)
            self._file.write(line)
            self._file.truncate()
            self._file.flush()

    def on_run_end(self, loop: Loop) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _header(columns: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(columns)
    return text.getvalue()


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]))


def _step(line: str) -> int:
    first = line.split(",")[0]
    return 0 if first == "step" else int(first)
