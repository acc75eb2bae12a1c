"""The manifest of a checkpoint: its files with their sizes and checksums, in a self-checksummed file."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from typing import Any

from .files import checksum, files_below, is_plain_file, join

MANIFEST = "manifest.json"


def describe_files(folder: str) -> dict[str, list[int]]:
    """Return size in bytes and CRC-32 of every file below a folder, by name."""
    return {name: [os.path.getsize(file), checksum(file)] for name, file in files_below(folder)}


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Write a manifest to disk; it is durable when this returns."""
    with open(os.path.join(folder, MANIFEST), "w") as file:
        file.write(_sealed(manifest))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: str) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: it is not exactly what was written.
    """
    with open(os.path.join(folder, MANIFEST), encoding="ascii") as file:
        text = file.read()
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) is None or _sealed(manifest) != text:
        raise ValueError("its checksum does not match")
    return manifest


def find_damage(folder: str, files: dict[str, list[int]]) -> str | None:
    """Return how the files of a checkpoint differ from its manifest, or None if they do not.

    Raises:
        ValueError: a name in the manifest leads outside the folder.
    """
    for name, (size, crc) in files.items():
        path = join(folder, name)
        if not is_plain_file(folder, path):
            return f"{name} is missing"
        if os.path.getsize(path) != size:
            return f"{name} has {os.path.getsize(path)} bytes, not {size}"
        if checksum(path) != crc:
            return f"the contents of {name} have changed"
    return None


def delete_listed(folder: str) -> None:
    """Delete the files that a checkpoint's manifest lists, and the folders that this empties.

    Other files are left alone.

    Raises:
        OSError, ValueError: the manifest cannot be read, or is damaged; nothing is deleted.
    """
    manifest = os.path.join(folder, MANIFEST)
    if os.path.lexists(manifest):
        files = [join(folder, name) for name in read_manifest(folder)["files"]]
        for file in files:
            if is_plain_file(folder, file):
                os.unlink(file)
        os.unlink(manifest)  # last: a deletion that is killed can be finished later
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it contains other files
            os.rmdir(inner)


def _sealed(manifest: dict[str, Any]) -> str:
    """Return the manifest as text with its own checksum at the end."""
    return json.dumps({**manifest, "checksum": zlib.crc32(json.dumps(manifest).encode())})
