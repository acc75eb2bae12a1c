"""Record files: text files with one record per line, which a resumed run continues without duplicate lines."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterable
from typing import TextIO

from .checks import local_file
from .loop import Loop
from .messages import log_user
from .records import Record


class RecordFile:
    r"""A text file with one record per line, which a resumed run continues without duplicate lines.

    Use it in a callback that writes records in your own format. Call `check_names`, `open` and `append` in
    `on_log`, and `close` in `on_run_end`. Every line is in the file when `append` returns. Lines that an earlier
    session wrote beyond the step from which the run resumes are removed, and so is a line that a killed process left
    incomplete. If a run from scratch finds a file, it renames the file to `<name>.1<ending>`. Only process 0 may
    open the file (see `onstep.processes.writes`).

    Args:
        who: the callback, for messages.
        path: the file. The file and its directory need not exist.
        step: `line -> step`. Return 0 for lines that every session keeps, such as a header. Raise a `ValueError`,
            `LookupError` or `TypeError` if the line is not a record.
        reserved: names that the line itself needs, such as `"step"`. Recorded values may not use them.

    Raises:
        ValueError: the path is a directory or a URL.

    Attributes:
        path: the absolute path of the file.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from onstep import Callback, Engine
    >>> from onstep.processes import writes
    >>> from onstep.testing import counting_step
    >>> class LossFile(Callback):
    ...     def __init__(self, path):
    ...         self.path = path
    ...         self._file = RecordFile("LossFile", path, step=lambda line: int(line.split()[0]))
    ...
    ...     def on_log(self, loop, record):
    ...         if not writes():
    ...             return
    ...         if not self._file.is_open:
    ...             self._file.open(loop)
    ...         self._file.append(f"{record.step} {record.values['train/loss']}\n")
    ...
    ...     def on_run_end(self, loop):
    ...         self._file.close()
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "loss.txt")
    ...     engine = Engine(counting_step, [LossFile(path)], log_every=1)
    ...     first = engine.run(0, [5, 6, 7], steps=1)
    ...     _ = engine.run(first, [5, 6, 7], steps=2)
    ...     print(path.read_text())
    1 5.0
    2 6.0
    """

    _file: TextIO | None = None

    def __init__(
        self, who: str, path: str | os.PathLike[str], *, step: Callable[[str], int], reserved: Iterable[str] = ()
    ):
        self.path: str = local_file(who, path)
        self._who, self._step, self._reserved = who, step, sorted(reserved)
        self._last = ""
        self._loop: weakref.ref[Loop] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the file is open, so that lines can be appended."""
        return self._file is not None

    def check_names(self, record: Record) -> None:
        """Check that a record has no value under a reserved name.

        Raises:
            ValueError: the record has one.
        """
        if taken := [name for name in self._reserved if name in record.values]:
            raise ValueError(
                f"{self._who} reserves the names {self._reserved}, got values for {taken}. "
                "Log these values under other names."
            )

    def open(self, loop: Loop) -> list[str]:
        """Open the file, and return the lines that are kept.

        If this run has already closed the file, all lines are kept: a callback may still log after the `on_run_end`
        of others.

        Raises:
            ValueError: the file has a line that is not a record. The file is not changed.
        """
        if self._loop is not None and self._loop() is loop:
            lines = _complete_lines(self.path)
        else:
            lines = lines_to_keep(loop, self.path, self._step)
            self._loop = weakref.ref(loop)
        self.replace(lines)
        return lines

    def append(self, line: str) -> None:
        r"""Write a line, which must end with `\n`, and flush it to the operating system."""
        file = self._opened()
        file.write(line)
        file.flush()
        self._last = line

    def replace_last(self, line: str) -> None:
        r"""Write a line, which must end with `\n`, in place of the last one."""
        file = self._opened()
        file.seek(file.tell() - len(self._last.encode()))
        file.write(line)
        file.truncate()
        file.flush()
        self._last = line

    def replace(self, lines: list[str]) -> None:
        """Replace the whole file in one atomic step, and leave it open at its end."""
        self.close()
        self._file = replace_file(self.path, lines)
        self._last = lines[-1] if lines else ""

    def lines(self) -> list[str]:
        """Return all lines of the open file."""
        file = self._opened()
        file.seek(0)
        lines = file.readlines()
        file.seek(0, os.SEEK_END)
        return lines

    def close(self) -> None:
        """Close the file if it is open."""
        file, self._file = self._file, None  # first, because closing fails if the disk is full
        if file is not None:
            file.close()

    def __del__(self) -> None:
        self.close()  # a record logged after `on_run_end` reopened it

    def _opened(self) -> TextIO:
        if self._file is None:
            raise ValueError(f"{self._who} needs to call open(loop) before it uses {self.path}.")
        return self._file


def lines_to_keep(loop: Loop, path: str, step: Callable[[str], int]) -> list[str]:
    r"""Return the lines of a file that a run keeps: those up to the step from which it resumes.

    An incomplete line at the end, which a killed process may leave, is dropped. A run from scratch keeps no lines: it
    renames the file of the earlier run to `<name>.1<ending>` and logs a message. `RecordFile` calls this for you.

    Args:
        loop: the run.
        path: the file. If its directory does not exist, it is created.
        step: `line -> step`, as for `RecordFile`.

    Raises:
        ValueError: a line is not a record, or the path is a directory.

    >>> import tempfile
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> engine = Engine(counting_step)
    >>> first = engine.run(0, [5, 6, 7], steps=2)
    >>> with tempfile.TemporaryDirectory() as directory, engine.steps(first, [5, 6, 7], steps=3) as steps:
    ...     path = os.path.join(directory, "loss.txt")
    ...     replace_file(path, ["1 5.0\n", "2 6.0\n", "3 7.0\n", "4 "]).close()
    ...     for loop in steps:
    ...         print(lines_to_keep(loop, path, lambda line: int(line.split()[0])))
    ['1 5.0\n', '2 6.0\n']
    """
    path = local_file("A record file", path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        return []
    if not loop.start_step:
        stem, ending = os.path.splitext(path)
        unused = next(free for n in itertools.count(1) if not os.path.lexists(free := f"{stem}.{n}{ending}"))
        os.rename(path, unused)
        log_user(f"{path} was written by another run; renamed it to {unused}")
        return []
    lines = _complete_lines(path)
    for number, line in enumerate(lines, 1):
        try:
            step(line)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a record: {line.strip()!r:.80}. Use another path."
            ) from error
    return [line for line in lines if step(line) <= loop.start_step]


def _complete_lines(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [line for line in file if line.endswith("\n")]


def replace_file(path: str, lines: Iterable[str]) -> TextIO:
    r"""Replace the content of a text file in one atomic step, and return the file, open at its end.

    If the process dies or writing fails partway through, the file keeps its old content.

    Args:
        path: the file, which need not exist.
        lines: the new content; each line ends with `\n`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = os.path.join(directory, "loss.txt")
    ...     with replace_file(path, ["1 5.0\n"]) as file:
    ...         _ = file.write("2 6.0\n")
    ...     print(Path(path).read_text())
    1 5.0
    2 6.0
    """
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    file = open(path, "r+", encoding="utf-8", newline="")  # noqa: SIM115 (the caller closes it)
    file.seek(0, os.SEEK_END)
    return file


def exit_status(loop: Loop) -> str:
    """Return how a run ended, in the words that experiment trackers use. Call it in `on_run_end`.

    Returns:
        `"finished"`; `"failed"` if an exception ended the run; `"killed"` if a signal did (`KeyboardInterrupt`,
        `SystemExit`), or if its stop was resumable.

    >>> from onstep import Engine
    >>> from onstep.testing import StopAt, counting_step
    >>> engine = Engine(counting_step, [StopAt(2, final=False)])
    >>> engine.on("run_end")(lambda loop: print(exit_status(loop)))
    <function <lambda> at ...>
    >>> _ = engine.run(0, [1, 1, 1], epochs=1)
    killed
    """
    if isinstance(loop.error, Exception):
        return "failed"
    return "finished" if loop.error is None and loop.finished else "killed"
