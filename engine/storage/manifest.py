"""The manifest of a checkpoint: its files with their sizes and checksums, in a self-checksummed file."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

from .files import checksum, files_below, is_plain_file, join, write_file

MANIFEST = "manifest.json"
FORMAT = 2
"""The format of checkpoints, as their manifests say. A newer one keeps the checksum at the end.

Format 1, of version 0.1, has a folder for each tree.
"""


class NewerFormatError(ValueError):
    """A checkpoint was written by a newer version."""


def describe_files(folder: str) -> dict[str, list[int]]:
    """Return size in bytes and CRC-32 of every file below a folder, by name."""
    return {name: [os.path.getsize(file), checksum(file)] for name, file in files_below(folder)}


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Write a manifest to disk; it is durable when this returns."""
    write_file(os.path.join(folder, MANIFEST), _sealed({"format": FORMAT, **manifest}).encode())


def read_manifest(folder: str) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        OSError: the manifest cannot be read.
        NewerFormatError: a newer version wrote it.
        ValueError: it is not exactly what was written.
    """
    with open(os.path.join(folder, MANIFEST), encoding="ascii") as file:
        text = file.read()
    try:
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and manifest.pop("checksum", None) is not None
        intact = intact and _sealed(manifest) == text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not intact:
        raise ValueError("its checksum does not match")
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{folder} has format {manifest['format']}, but this version of onstep reads format {FORMAT}. "
            "Upgrade onstep, or use another directory."
        )
    if wrong := [name for name, is_valid in _FIELDS.items() if not is_valid(manifest.get(name))]:
        raise ValueError(f"it has no valid {', '.join(map(repr, wrong))}")
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_dict(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_item, value.values()))


def _is_pair(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_item, value))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: _is_int(value) and 1 <= value <= FORMAT,
    "run": lambda value: isinstance(value, str),
    "step": _is_int,
    "best": lambda value: value is None or _is_pair(value, lambda item: isinstance(item, str)),
    "metrics": lambda value: _is_dict(value, _is_number),
    "files": lambda value: _is_dict(value, lambda item: _is_pair(item, _is_int)),
    "config": lambda value: value is None or isinstance(value, dict),
}
"""Whether a field of a manifest is valid, by name. `best` and `config` are missing in those of early versions."""


def _sealed(manifest: dict[str, Any]) -> str:
    """Return the manifest as text with its own checksum at the end."""
    return json.dumps({**manifest, "checksum": zlib.crc32(json.dumps(manifest).encode())})
