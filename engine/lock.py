"""One directory, one live process."""

from __future__ import annotations

import contextlib
import os

LOCK = ".lock"


class Lock:
    """Makes a directory this process's own until it is released; a dead process holds no lock.

    Args:
        directory: made when the lock is taken, if need be; removed when it is released, if it was
            made for it and stayed empty.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self._file: int | None = None
        self._made: list[str] = []

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RuntimeError: a run that is alive holds it.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        path, parent = os.path.join(self.directory, LOCK), self.directory
        while not os.path.isdir(parent):
            self._made.append(parent)
            parent = os.path.dirname(parent)
        os.makedirs(self.directory, exist_ok=True)
        while self._file is None:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                message = f"Another run that is alive writes {self.directory}. Give another directory."
                raise RuntimeError(message) from None
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                self._file = file
            else:  # the one who held it has just removed it
                os.close(file)

    def release(self) -> None:
        """Gives the directory back, if it is held."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.directory, LOCK))
                for made in self._made:
                    os.rmdir(made)
            os.close(self._file)
            self._file, self._made = None, []
