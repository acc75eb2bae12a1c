"""TensorBoard event files: one writer for a run and a directory, whoever writes."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from . import processes

if TYPE_CHECKING:
    from .loop import Loop

_writers: weakref.WeakKeyDictionary[Loop, dict[str, Any]] = weakref.WeakKeyDictionary()


def writer(loop: Loop, directory: str | os.PathLike[str], *, flush_seconds: int = 10) -> Any:
    """The run's tensorboardX `SummaryWriter` of a directory; the first call makes its file.

    The file begins with a mark at which readers hide what lies beyond the step where the run
    begins. A second file with such a mark would hide points of the first, so callbacks share one.
    Process 0 alone writes; the others get one that takes everything and writes nothing.
    """
    if not processes.writes():
        return _Nowhere()
    writers = _writers.setdefault(loop, {})
    path = os.path.abspath(directory)
    if writers.get(path) is None:
        from tensorboardX import SummaryWriter

        # Two writers in one second would share a file, and one would lose its points; and readers
        # take files in the order of their names.
        writers[path] = SummaryWriter(
            path,
            purge_step=None if path in writers else loop.first_step + 1,
            flush_secs=flush_seconds,
            filename_suffix=f".{time.time_ns()}.{uuid.uuid4().hex[:8]}",
        )
    return writers[path]


class _Nowhere:
    """Has every attribute, and can be called."""

    def __getattr__(self, name: str) -> _Nowhere:
        return self

    def __call__(self, *args: Any, **options: Any) -> _Nowhere:
        return self


def close(loop: Loop, directory: str | os.PathLike[str]) -> None:
    """Puts on disk what was written; a later `writer` goes on in a new file, without a mark."""
    path = os.path.abspath(directory)
    writers = _writers.get(loop, {})
    if writers.get(path) is not None:
        writers[path].close()
        writers[path] = None
