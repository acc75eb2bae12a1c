"""A lock on a directory, so that only one live process writes to it."""

from __future__ import annotations

import contextlib
import os

from ..checks import local_path

LOCK = ".lock"


class Lock:
    """Locks a directory for this process until it is released. A process that has died holds no lock.

    Take it before you write to a run's directory with a `CheckpointWriter`. On systems without `flock` it does nothing.

    Args:
        directory: created by `acquire` if needed, and then removed by `release` if it is still empty.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> lock = Lock(directory.name)
    >>> lock.acquire()
    >>> Lock(directory.name).acquire()
    Traceback (most recent call last):
    ...
    RuntimeError: Another live process is writing to .... Use another directory.
    >>> lock.release()
    >>> directory.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory: str = local_path("Lock", directory)
        self._file: int | None = None
        self._created: list[str] = []  # folders, the innermost first

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RuntimeError: another live process holds it.
        """
        try:
            import fcntl
        except ImportError:  # this system has no flock
            return
        path, parent = os.path.join(self.directory, LOCK), self.directory
        while not os.path.isdir(parent):
            self._created.append(parent)
            parent = os.path.dirname(parent)
        os.makedirs(self.directory, exist_ok=True)
        while self._file is None:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                message = f"Another live process is writing to {self.directory}. Use another directory."
                raise RuntimeError(message) from None
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                self._file = file
            else:  # another process has removed the file since
                os.close(file)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.directory, LOCK))
                for folder in self._created:
                    os.rmdir(folder)
            os.close(self._file)
            self._file, self._created = None, []
