"""Files below a folder: listed and checked without following a link or a name that leads outside."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator


def names_in(path: str) -> set[str]:
    """Return the names in a folder, an empty set if it does not exist."""
    try:
        return set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def files_below(path: str) -> Iterator[tuple[str, str]]:
    """Yield every file below a folder: its name relative to the folder, with slashes, and its path."""
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            file = os.path.join(folder, name)
            yield os.path.relpath(file, path).replace(os.sep, "/"), file


def write_file(path: str, data: bytes) -> None:
    """Write a file to disk; it is durable when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def join(folder: str, name: str) -> str:
    """Return the path of a file of a checkpoint from its name in the manifest.

    Raises:
        ValueError: the name leads outside the folder.
    """
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or os.path.isabs(name) or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in a checkpoint")
    return os.path.join(folder, *parts)


def is_plain_file(folder: str, path: str) -> bool:
    """Return whether a path below a folder is a regular file that is reached from the folder without a link."""
    parent = os.path.dirname(path)
    while parent != folder:
        if os.path.islink(parent):
            return False
        parent = os.path.dirname(parent)
    return os.path.isfile(path) and not os.path.islink(path)


def checksum(path: str) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
