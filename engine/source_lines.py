"""The user's line behind an equation of a traced program. JAX has no public function for this.

Without the private ones, the functions here return less.
"""

from __future__ import annotations

import linecache
import os
import sysconfig
from dataclasses import dataclass
from typing import Any

_LIBRARIES = tuple(os.path.join(sysconfig.get_paths()[name], "") for name in ("purelib", "platlib", "stdlib"))


@dataclass(frozen=True)
class Line:
    """A line of Python, and what is called in it.

    Attributes:
        file: its path.
        number: of the line, counted from 1.
        function: in which it is.
        code: the expression, as far as it is on this line.
    """

    file: str
    number: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.number} ({self.function})"


def lines_of(eqn: Any) -> list[Line]:
    """Return the lines of users and libraries that asked for an equation, the innermost first; [] if unknown."""
    try:
        from jax._src import source_info_util

        frames = list(source_info_util.user_frames(eqn.source_info.traceback))
        return [_line(frame) for frame in frames]
    except Exception:
        return []


def is_backward(eqn: Any) -> bool:
    """Return whether an equation belongs to a backward pass; False if unknown."""
    try:
        return "transpose" in str(eqn.source_info.name_stack)
    except Exception:
        return False


def own_lines(lines: list[Line]) -> list[Line]:
    """Return the lines that are in no installed library."""
    return [line for line in lines if not line.file.startswith(_LIBRARIES)]


def _line(frame: Any) -> Line:
    text = linecache.getline(frame.file_name, frame.start_line)
    end = frame.end_column if frame.end_line == frame.start_line else None
    code = text.encode()[frame.start_column : end].decode(errors="replace").strip()
    more = "" if end is not None or not code else " ..."
    return Line(frame.file_name, frame.start_line, frame.function_name.split(".")[-1], code + more)


def _short(path: str) -> str:
    """Return a path relative to the installed libraries or the working directory, if it is in one of them."""
    for folder in (*_LIBRARIES, os.path.join(os.getcwd(), "")):
        if path.startswith(folder):
            return path[len(folder) :]
    return path
