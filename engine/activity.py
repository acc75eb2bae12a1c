"""What the main thread is doing, in words, for messages about processes that wait for each other."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from types import FrameType

import jax

WORDS = (
    ("processes", "", "waiting for the other processes"),
    ("data.stream", "", "reading the data"),
    ("data.prefetch", "", "reading the data"),
    ("compiled.step", "CompiledStep.prepare", "compiling the step"),
    ("compiled.throttle", "", "waiting for the device"),
)
"""Modules and functions of onstep, and what a thread inside them is doing. The innermost one counts."""

_PACKAGE = __name__.rpartition(".")[0]
_LIBRARIES = (sysconfig.get_path("stdlib"), os.path.dirname(jax.__file__))


def main_activity() -> tuple[str, str]:
    """Return what the main thread is doing, and the user's line of code that it is in.

    Nothing has to be recorded while a run trains, because this looks at the stack of the thread.

    Returns:
        For example `("reading the data", "train.py:31 in batches")`. The second is `""` if no code of the user's is
        running.

    >>> main_activity()[0]
    'running steps'
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    activity = line = ""
    while frame is not None:
        line = line or _user_line(frame)
        activity = activity or _word(frame)
        if handler := _handler(frame):
            return (f"{activity} in {handler}" if activity else f"in {handler}"), line
        frame = frame.f_back
    return activity or "running steps", line if activity == "reading the data" else ""


def _word(frame: FrameType) -> str:
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
    matches = (word for end, start, word in WORDS if module == f"{_PACKAGE}.{end}" and name.startswith(start))
    return next(matches, "")


def _handler(frame: FrameType) -> str:
    """Return the name of a callback and its event if the frame is its call."""
    if frame.f_globals.get("__name__") == f"{_PACKAGE}.events" and frame.f_code.co_qualname == "Handler.call":
        handler = frame.f_locals["self"]
        return f"{handler.name}.{handler.event}"
    return ""


def _user_line(frame: FrameType) -> str:
    path, package = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
    if package == _PACKAGE or path.startswith((*_LIBRARIES, "<")) or "site-packages" in path:
        return ""
    return f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
