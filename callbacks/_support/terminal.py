"""Lines at the bottom of a terminal that are drawn again and again, and make room for everything else."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from onstep.tools import print_text


def is_terminal(file: Any) -> bool:
    """Return whether a file is a terminal. A closed file is not."""
    with contextlib.suppress(ValueError):
        return bool(getattr(file, "isatty", lambda: False)())
    return False


def terminal_columns(file: Any) -> int:
    """Return the width of a terminal."""
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return shutil.get_terminal_size().columns or 80


def width(text: str) -> int:
    """Return the columns that a text takes in a terminal: two for each wide character, such as Chinese ones.

    >>> width("loss"), width("损失")
    (4, 4)
    """
    if text.isascii():
        return len(text)
    return sum((unicodedata.east_asian_width(c) in "WF") + (not unicodedata.combining(c)) for c in text)


class MovingLines:
    """Lines that each `draw` replaces. Whatever else is printed appears above them.

    When somebody prints, the lines are removed first. The next `draw` shows them again, below the text. If there are
    several of these, as for a run inside a callback, only one is on the screen.

    Args:
        file: the terminal.
    """

    def __init__(self, file: TextIO):
        self.file: TextIO = file
        self._drawn: list[int] = []  # the widths of the lines on the screen
        _watch.add(self)

    @property
    def newest(self) -> bool:
        """Whether no other lines were made after these ones, by a run inside a callback for example."""
        return _watch.newest is self

    def draw(self, lines: list[str]) -> None:
        """Show these lines in place of the earlier ones."""
        with _watch.drawing(self):
            start = "\n" if _watch.line_begun else self._up()
            print_text(start + "\n".join(lines), self.file, end="")
            self._drawn = [width(line) for line in lines]

    def clear(self) -> None:
        """Remove the lines from the screen."""
        with _watch.writing():
            if self._drawn:
                print_text(self._up(), self.file, end="")
                self._drawn = []

    def leave(self) -> None:
        """Leave the lines on the screen, with the cursor below them."""
        with _watch.writing():
            if self._drawn:
                print_text("", self.file)
                self._drawn = []

    def close(self) -> None:
        """Remove the lines from the screen; nothing is drawn any more."""
        self.clear()
        _watch.remove(self)

    def _up(self) -> str:
        """Return the text that moves the cursor to the first line, and erases everything from there.

        Lines that have become wider than the terminal take several rows.
        """
        if not self._drawn:
            return "\r\x1b[J"
        columns = terminal_columns(self.file)
        rows = sum(max(1, -(-drawn // columns)) for drawn in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"


class _Watch:
    """Watches the streams through which this process writes to the terminal, while there are moving lines.

    It replaces the `write` of a stream rather than `sys.stdout`, because a logger keeps the stream it was given.

    Attributes:
        line_begun: whether somebody printed a text that did not end its line.
        lock: held while anything is written, because other threads print as well.
    """

    def __init__(self) -> None:
        self.line_begun: bool = False
        self.lock: threading.RLock = threading.RLock()  # a signal handler may print in the thread that holds it
        self._moving: list[MovingLines] = []
        self._streams: list[tuple[Any, Callable[[str], int], Any]] = []  # stream, the new `write`, its own earlier one
        self._writing = False

    @property
    def newest(self) -> MovingLines | None:
        """The moving lines that were added last."""
        return self._moving[-1] if self._moving else None

    def add(self, lines: MovingLines) -> None:
        """Make room for moving lines from now on."""
        with self.lock:
            self._moving.append(lines)
            self._replace_writes(lines)

    def remove(self, lines: MovingLines) -> None:
        """Forget moving lines, and stop watching after the last of them."""
        with self.lock:
            if lines in self._moving:
                self._moving.remove(lines)
            while self._streams and not self._moving:
                stream, write, own = self._streams.pop()
                if vars(stream).get("write") is not write:
                    continue  # somebody else, such as W&B, has replaced it since
                if own is None:
                    del stream.write
                else:
                    stream.write = own
            self.line_begun = self.line_begun and bool(self._moving)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write to the terminal in this block as it is: nothing makes room, and no other thread writes."""
        with self.lock:
            was_writing, self._writing = self._writing, True
            try:
                yield
            finally:
                self._writing = was_writing

    @contextlib.contextmanager
    def drawing(self, lines: MovingLines) -> Iterator[None]:
        """Draw moving lines in this block, with all others removed from the screen."""
        with self.writing():
            self._replace_writes(lines)
            for other in self._moving:
                if other is not lines:
                    other.clear()
            for stream, _, _ in self._streams if self.line_begun else ():
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()  # the begun line may be in a buffer
            yield
            self.line_begun = False

    def _replace_writes(self, lines: MovingLines) -> None:
        """Watch the streams that are terminals now; `sys.stdout` may be another one than at the last call."""
        for stream in (lines.file, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if is_terminal(stream) and not any(stream is watched for watched, _, _ in self._streams):
                self._replace_write(stream)

    def _replace_write(self, stream: Any) -> None:
        replaced, own = stream.write, getattr(stream, "__dict__", {}).get("write")

        def write(text: str) -> int:
            with self.lock:
                if not self._writing:
                    self._make_room(text)
                return replaced(text)

        with contextlib.suppress(AttributeError):  # an object that does not allow it
            stream.write = write
            self._streams.append((stream, write, own))

    def _make_room(self, text: str) -> None:
        for lines in self._moving:
            lines.clear()
        if text:
            rest = text.rpartition("\n")[2]
            self.line_begun = rest != "" and "\r" not in rest  # another library's moving line may be overwritten

    def renew_lock(self) -> None:
        """Replace the lock: in a forked child, it may be held by a thread that the child does not have."""
        self.lock, self._writing = threading.RLock(), False


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch.renew_lock)
