"""What a thread of a run is doing, in words: for people who wait, and for processes that wait for each other."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from types import FrameType
from typing import NamedTuple

import jax

WORDS = (
    ("onstep.processes", "", "waiting for the other processes"),
    ("onstep.data.stream", "BatchStream._skip", "skipping data that was already used"),
    ("onstep.data.stream", "", "reading the data"),
    ("onstep.data.prefetch", "", "reading the data"),
    ("onstep.compiled.step", "CompiledStep.prepare", "compiling the step"),
    ("onstep.compiled.throttle", "", "waiting for the device"),
    ("onstep.evaluate", "evaluate", "evaluating"),
    ("onstep.evaluate", "check_evaluation", "tracing the evaluation step"),
    ("onstep.storage.checkpoints", "Checkpoints.damage", "verifying a checkpoint"),
    ("onstep.storage.checkpoints", "Checkpoints.load", "restoring a checkpoint"),
    ("onstep.storage.writer", "", "saving a checkpoint"),
    ("onstep.loop", "Loop.restore", "restoring the run"),
    ("jax._src.compiler", "", "compiling"),
)
"""Modules and functions, and what a thread inside them is doing. The innermost one counts."""

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = (sysconfig.get_path("stdlib"), os.path.dirname(jax.__file__))


class Activity(NamedTuple):
    """What a thread is doing.

    Attributes:
        what: in words, such as `"reading the data"`; `""` for anything else, such as running steps.
        callback: the name of the callback whose handler runs, otherwise `""`.
        event: the event that it handles, otherwise `""`.
        line: the user's line of code in a handler or in the data, such as `"train.py:31 in batches"`, otherwise `""`.

    >>> thread_activity(threading.get_ident())
    Activity(what='', callback='', event='', line='')
    """

    what: str
    callback: str = ""
    event: str = ""
    line: str = ""


def thread_activity(thread: int) -> Activity:
    """Return what a thread is doing.

    Nothing has to be recorded while a run trains, because this looks at the stack of the thread.

    Args:
        thread: the `ident` of the thread.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state, {}))
    >>> @engine.on("run_begin")
    ... def show(loop):
    ...     print(thread_activity(threading.get_ident()))
    >>> result = engine.run(0, [1], epochs=1)
    Activity(what='', callback='show', event='on_run_begin', line='')
    """
    frame = sys._current_frames().get(thread)
    what = line = ""
    while frame is not None:
        line = line or _user_line(frame)
        word = _word(frame)
        if not what or (what, word) == ("compiling", "compiling the step"):
            what = word
        if handler := _handler(frame):
            return Activity(what, *handler, line)
        frame = frame.f_back
    return Activity(what, line=line if what == "reading the data" else "")


def main_activity() -> tuple[str, str]:
    """Return what the main thread is doing, and the user's line of code that it is in.

    Returns:
        For example `("reading the data", "train.py:31 in batches")`. The second is `""` if no code of the user's is
        running.

    >>> main_activity()[0]
    'running steps'
    """
    activity = thread_activity(threading.main_thread().ident or 0)
    if activity.callback:
        return f"{activity.what} in {activity.callback}.{activity.event}".lstrip(), activity.line
    return activity.what or "running steps", activity.line


def _word(frame: FrameType) -> str:
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
    return next((word for where, start, word in WORDS if module == where and name.startswith(start)), "")


def _handler(frame: FrameType) -> tuple[str, str] | None:
    """Return the name of a callback and its event if the frame is its call."""
    if frame.f_globals.get("__name__") == f"{_PACKAGE}.events" and frame.f_code.co_qualname == "Handler.call":
        handler = frame.f_locals["self"]
        return handler.name, handler.event
    return None


def _user_line(frame: FrameType) -> str:
    path, package = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
    if package == _PACKAGE or path.startswith((*_LIBRARIES, "<")) or "site-packages" in path:
        return ""
    return f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
