"""TensorBoard event files: all callbacks of a run share one writer per directory."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from typing import Any

from . import processes
from .loop import Loop

_writers: weakref.WeakKeyDictionary[Loop, dict[str, Any]] = weakref.WeakKeyDictionary()
"""Writers by run and absolute path; None once a writer was closed."""


def event_writer(loop: Loop, directory: str | os.PathLike[str], *, flush_seconds: int = 10) -> Any:
    """Return the tensorboardX `SummaryWriter` that all callbacks of a run share for a directory.

    Use it in a callback that writes to TensorBoard, and call `close_event_writer` in `on_run_end`. The first call
    creates the event file. The file begins with a purge step, which makes TensorBoard hide the points that an earlier
    session wrote beyond the step from which the run resumes. A second file with a purge step would hide points of
    the first one, which is why callbacks share a writer.

    Args:
        loop: the run.
        directory: as for `tensorboard --logdir`.
        flush_seconds: the longest time that a point waits before it is written to disk.

    Returns:
        The writer in process 0. In the other processes, an object that accepts every call and writes nothing.

    >>> import tempfile
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     engine = Engine(counting_step)
    ...
    ...     @engine.on("step_end")
    ...     def write(loop):
    ...         event_writer(loop, directory).add_scalar("sum", int(loop.state), loop.step)
    ...
    ...     @engine.on("run_end")
    ...     def close(loop):
    ...         event_writer(loop, directory).add_text("result", str(loop.state), loop.step)  # the same writer
    ...         close_event_writer(loop, directory)
    ...
    ...     _ = engine.run(0, [1, 2, 3], epochs=1)
    ...     print(len(os.listdir(directory)), "file")
    1 file
    """
    if not processes.writes():
        return _NullWriter()
    writers = _writers.setdefault(loop, {})
    path = os.path.abspath(directory)
    if writers.get(path) is None:
        from tensorboardX import SummaryWriter

        # The suffix is unique because two writers in the same second would share a file, and one would lose its
        # points. It begins with the time because readers read files in the order of their names.
        writers[path] = SummaryWriter(
            path,
            purge_step=None if path in writers else loop.start_step + 1,
            flush_secs=flush_seconds,
            filename_suffix=f".{time.time_ns()}.{uuid.uuid4().hex[:8]}",
        )
    return writers[path]


class _NullWriter:
    """Has every attribute, accepts every call, and writes nothing."""

    def __getattr__(self, name: str) -> _NullWriter:
        return self

    def __call__(self, *args: Any, **options: Any) -> _NullWriter:
        return self


def close_event_writer(loop: Loop, directory: str | os.PathLike[str]) -> None:
    """Write all points to disk and close a run's writer of a directory, if there is one.

    Every callback that uses `event_writer` calls this in `on_run_end`. If another callback writes afterwards, it
    gets a new file without a purge step, so no point is hidden.

    Args:
        loop: the run.
        directory: as for `event_writer`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> engine = Engine(counting_step)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...
    ...     @engine.on("run_end")
    ...     def write(loop):
    ...         event_writer(loop, directory).add_text("note", "the data was shuffled", loop.step)
    ...         close_event_writer(loop, directory)
    ...
    ...     _ = engine.run(0, [1, 2, 3], epochs=1)
    ...     [file] = Path(directory).iterdir()
    ...     print(b"the data was shuffled" in file.read_bytes())
    True
    """
    path = os.path.abspath(directory)
    writers = _writers.get(loop, {})
    if writers.get(path) is not None:
        writers[path].close()
        writers[path] = None
