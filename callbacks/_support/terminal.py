"""Lines at the bottom of a terminal that are drawn again and again, and make room for everything else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from onstep.tools import print_text


def is_terminal(file: Any) -> bool:
    """Return whether a file is a terminal. A closed file is not."""
    with contextlib.suppress(ValueError):
        return bool(getattr(file, "isatty", lambda: False)())
    return False


class MovingLines:
    """Lines that each `draw` replaces. Whatever else is printed appears above them.

    When somebody prints, the lines are removed first. The next `draw` shows them again, below the text.

    Args:
        file: the terminal.
    """

    def __init__(self, file: TextIO):
        self.file: TextIO = file
        self._drawn = 0  # lines on the screen

    def draw(self, lines: list[str]) -> None:
        """Show these lines in place of the earlier ones."""
        with _watch.drawing(self):
            start = "\n" if _watch.line_begun else self._up() + "\x1b[J"
            print_text(start + "\n".join(lines), self.file, end="")
            self._drawn = len(lines)

    def clear(self) -> None:
        """Remove the lines from the screen."""
        if self._drawn:
            print_text(self._up() + "\x1b[J", self.file, end="")
            self._drawn = 0

    def close(self) -> None:
        """Leave the lines on the screen, with the cursor below them."""
        _watch.remove(self)
        if self._drawn:
            print_text("", self.file)

    def _up(self) -> str:
        """Return the text that moves the cursor to the first line."""
        return "\r" + (f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else "")


class _Watch:
    """Watches the streams through which this process writes to the terminal, while there are moving lines.

    It replaces the `write` of a stream rather than `sys.stdout`, because a logger keeps the stream it was given.

    Attributes:
        line_begun: whether somebody printed a text that did not end its line.
    """

    def __init__(self) -> None:
        self.line_begun: bool = False
        self._moving: list[MovingLines] = []
        self._streams: list[tuple[Any, Callable[[str], int], Any]] = []  # stream, the new `write`, its own earlier one
        self._drawing = False

    @contextlib.contextmanager
    def drawing(self, lines: MovingLines) -> Iterator[None]:
        """Draw moving lines in this block, with all others removed from the screen."""
        if lines not in self._moving:
            self._moving.append(lines)
        for stream in (lines.file, sys.stdout, sys.stderr):
            if is_terminal(stream) and not any(stream is watched for watched, _, _ in self._streams):
                self._replace_write(stream)
        self._drawing = True
        try:
            for other in self._moving:
                if other is not lines:
                    other.clear()
            for stream, _, _ in self._streams if self.line_begun else ():
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()  # the begun line may be in a buffer
            yield
            self.line_begun = False
        finally:
            self._drawing = False

    def remove(self, lines: MovingLines) -> None:
        """Forget moving lines, and stop watching after the last of them."""
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

    def _replace_write(self, stream: Any) -> None:
        replaced, own = stream.write, getattr(stream, "__dict__", {}).get("write")

        def write(text: str) -> int:
            if not self._drawing:
                self._make_room(text)
            return replaced(text)

        with contextlib.suppress(AttributeError):  # an object that does not allow it
            stream.write = write
            self._streams.append((stream, write, own))

    def _make_room(self, text: str) -> None:
        self._drawing = True
        try:
            for lines in self._moving:
                lines.clear()
        finally:
            self._drawing = False
        if text:
            rest = text.rpartition("\n")[2]
            self.line_begun = rest != "" and "\r" not in rest  # another library's moving line may be overwritten


_watch = _Watch()
