"""A lock on a directory, so that only one live process writes to it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os

from ..checks import local_path

LOCK = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EAGAIN)
"""The errors that mean that somebody else holds the lock."""

_held: dict[int, Lock] = {}
"""The locks that this process holds, by the descriptor of the lock file."""


class Lock:
    """Locks a directory for this process until it is released. A process that has died holds no lock.

    Take it before you write to a run's directory with a `CheckpointWriter`. On systems without `flock` it does nothing.
    A forked child of the process does not hold the lock.

    Args:
        directory: created by `acquire` if needed, and then removed by `release` if it is still empty.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> lock = Lock(directory.name)
    >>> lock.acquire()
    >>> Lock(directory.name).acquire()
    Traceback (most recent call last):
    ...
    RuntimeError: Another run of this process is writing to .... Use another directory.
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
            RuntimeError: another live process, or another run of this process, holds it.
            OSError: the lock file cannot be opened, or the file system cannot lock it.
        """
        try:
            import fcntl
        except ImportError:  # this system has no flock
            return
        _drop_locks_in_children()
        path, parent = os.path.join(self.directory, LOCK), self.directory
        while not os.path.isdir(parent):
            self._created.append(parent)
            parent = os.path.dirname(parent)
        os.makedirs(self.directory, exist_ok=True)
        while not self._is_held():
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process may have removed the file since it was opened. Then take the lock of the new one.
                if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                    self._file, _held[file] = file, self
            except OSError as error:
                if error.errno != errno.EINTR:
                    if self._created and error.errno not in HELD:
                        self._remove()
                    raise self._explain(error) from None
            finally:
                if file not in _held:
                    os.close(file)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._file is not None and self._is_held():
            self._remove()
            del _held[self._file]
            os.close(self._file)
            self._file = None

    def _is_held(self) -> bool:
        return self._file is not None and _held.get(self._file) is self

    def _remove(self) -> None:
        """Remove the lock file, and the folders that were created for it and are empty."""
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.directory, LOCK))
            for folder in self._created:
                os.rmdir(folder)
        self._created = []

    def _explain(self, error: OSError) -> Exception:
        """Return an error that says why the lock could not be taken, and what to do."""
        if error.errno not in HELD:
            return OSError(
                error.errno,
                f"{self.directory} cannot be locked ({os.strerror(error.errno or 0)}): its file system may not support "
                "flock. Use another one, or pass lock=False if no other process writes to the directory",
            )
        here = os.path.realpath(self.directory)
        own = any(os.path.realpath(lock.directory) == here for lock in _held.values())
        who = "Another run of this process" if own else "Another live process"
        return RuntimeError(f"{who} is writing to {self.directory}. Use another directory.")


def _drop_inherited_locks() -> None:
    """Close a forked child's copies of the lock files, which would keep the lock after this process has died."""
    for file in _held:
        os.close(file)
    _held.clear()


@functools.cache  # once per process
def _drop_locks_in_children() -> None:
    os.register_at_fork(after_in_child=_drop_inherited_locks)
