"""What those who write records down share: how a file is continued, and how a run ended."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TextIO

from .messages import log_user as notice

if TYPE_CHECKING:
    from .loop import Loop


def kept(loop: Loop, path: str, step: Callable[[str], int]) -> list[str]:
    """The lines of a file that a run goes on with: those up to the step at which it begins here.

    A line that a killed process left half written is not among them. For a run that begins at step 0
    there are none: the file of another run is moved aside.

    Args:
        path: need not exist; its directory is made.
        step: of a line.

    Raises:
        ValueError: a line has no step.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        return []
    if not loop.first_step:
        stem, ending = os.path.splitext(path)
        aside = next(free for n in itertools.count(1) if not os.path.lexists(free := f"{stem}.{n}{ending}"))
        os.rename(path, aside)
        notice(f"{path} was written by another run; it is now {aside}")
        return []
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    for number, line in enumerate(lines, 1):
        try:
            step(line)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is no record: {line.strip()!r:.80}. Give another path."
            ) from error
    return [line for line in lines if step(line) <= loop.first_step]


def rewrite(path: str, lines: Iterable[str]) -> TextIO:
    """Puts lines in the place of a file, at once or not at all; gives it open at its end."""
    aside = f"{path}.tmp"
    with open(aside, "w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    file = open(path, "r+", encoding="utf-8", newline="")  # noqa: SIM115 (closed at the run's end)
    file.seek(0, os.SEEK_END)
    return file


def ended(loop: Loop) -> str:
    """How a run ended: `"finished"`, `"failed"`, or `"killed"`, by a signal or to be resumed."""
    if isinstance(loop.error, Exception):
        return "failed"
    return "finished" if loop.error is None and loop.finished else "killed"


def needs(who: str, package: str) -> None:
    """Raises an ImportError that says how to get a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{who} needs {package}: pip install 'onstep[{package}]'.")
