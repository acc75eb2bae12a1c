"""TensorBoard event files: all callbacks of a run share one writer per directory."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import time
import uuid
import weakref
from typing import Any

from . import processes
from .checks import local_path
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
        flush_seconds: seconds between two fsyncs of the file. Points are written immediately, so only a crash of
            the machine can lose those since the last fsync.

    Returns:
        The writer in process 0. In the other processes, an object that accepts every call and writes nothing.

    Raises:
        OSError: the file cannot be created. The calls that add a point raise it if the point cannot be written.
        ValueError: `directory` is a URL.

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
    path = local_path("event_writer", directory)
    writers = _writers.setdefault(loop, {})
    writer = writers.get(path)
    if writer is None or writer.file_writer is None:  # its user may have closed it
        writers[path] = _summary_writer(path, flush_seconds, None if path in writers else loop.start_step + 1)
    return writers[path]


class _EventFile:
    """An event file, written in the caller's thread, in place of tensorboardX's `EventFileWriter`.

    That one writes in a thread, which ends at the first failed write: points are lost without an error, or the caller
    waits for ever for room in its queue. Here the caller gets the error.
    """

    def __init__(self, directory: str, flush_seconds: float, purge_step: int | None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # made at run time

        os.makedirs(directory, exist_ok=True)
        # The name is unique because two writers in the same second would share a file, and one would lose its
        # points. It begins with the time because readers read files in the order of their names.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{uuid.uuid4().hex[:8]}"
        self._directory, self._flush_seconds, self._flushed = directory, flush_seconds, -math.inf
        self._file = open(os.path.join(directory, name), "xb")  # noqa: SIM115 (closed by `close`)
        try:
            self.add_event(Event(wall_time=now / 1e9, file_version="brain.Event:2"))
            if purge_step is not None:
                began = SessionLog(status=SessionLog.START)
                self.add_event(Event(wall_time=now / 1e9, step=purge_step, file_version="brain.Event:2"))
                self.add_event(Event(wall_time=now / 1e9, step=purge_step, session_log=began))
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def get_logdir(self) -> str:
        """Return the directory."""
        return self._directory

    def add_event(self, event: Any) -> None:
        """Write an event, in the format of TFRecord files."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(b"".join([length, checksums[0], data, checksums[1]]))
        self._file.flush()
        if time.monotonic() >= self._flushed + self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Force the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Force the file to disk, and close it."""
        if not self._file.closed:
            with self._file:
                self.flush()


def _summary_writer(directory: str, flush_seconds: float, purge_step: int | None) -> Any:
    """Return a tensorboardX `SummaryWriter` that writes to an `_EventFile`."""
    from tensorboardX.writer import FileWriter, SummaryWriter

    class Files(FileWriter):
        def __init__(self, purge_step: int | None) -> None:  # that of FileWriter starts a thread
            self.event_writer = _EventFile(directory, flush_seconds, purge_step)
            self._default_metadata: dict[str, Any] = {}

    class Writer(SummaryWriter):
        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                self.file_writer, self.purge_step = Files(self.purge_step), None
                self.all_writers = {directory: self.file_writer}
            return self.file_writer

    return Writer(directory, purge_step=purge_step)


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
    path = local_path("close_event_writer", directory)
    writers = _writers.get(loop, {})
    writer = writers.get(path)
    if writer is not None:
        writers[path] = None  # first, because closing fails if the disk is full
        if (file := writer.file_writer) is not None:
            with contextlib.closing(file):
                writer.close()
