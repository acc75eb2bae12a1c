"""A directory of checkpoints: written by Orbax, committed by a manifest with checksums.

`<directory>/N` is a complete checkpoint of step N, always: it is written under `.saving`, given its
manifest, and moved into place by one rename. Orbax is imported when something is saved or loaded.
Of several processes all call `save`, `load`, `wait` and `close`; process 0 alone does the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from . import processes
from .records import improves

MANIFEST, HOST = "manifest.json", "host.npz"
_SAVING, _ASIDE, _TRASH = ".saving", "aside", ".trash"


class Storage:
    """The checkpoints of one run in one directory.

    Args:
        directory: made when something is written.
        keep: newest checkpoints that stay; None for all.
        best: the metric by which one more stays, the best.
        mode: `"min"` or `"max"`.
    """

    def __init__(self, directory: str, keep: int | None = None, best: str | None = None, mode: str = "min"):
        self.directory: str = os.path.abspath(directory)
        self.keep: int | None = keep
        self.best: str | None = best
        self.mode: str = mode
        self.spared: int | None = None  # a step that is not deleted: the one that the run goes on from
        self.run: str = uuid.uuid4().hex
        self._checkpointer: Any = None
        self._commit: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: int | None = None  # the step whose save was begun last, until it was waited for

    # What is there

    def steps(self) -> list[int]:
        """The steps of the checkpoints, damaged ones too, oldest first; a link is none."""
        steps = [int(name) for name in _names(self.directory) if re.fullmatch(r"0|[1-9]\d*", name)]
        marks = (MANIFEST, "_CHECKPOINT_METADATA")  # ours, and Orbax's where ours is lost
        return sorted(n for n in steps if not os.path.islink(self.path(n)) and set(marks) & _names(self.path(n)))

    def path(self, *parts: int | str) -> str:
        """A path in the directory."""
        return os.path.join(self.directory, *map(str, parts))

    def best_step(self) -> int | None:
        """The step with the best value of the metric; of equal ones the earliest.

        Without a metric here, by the one that the newest checkpoint was saved with.
        """
        manifests = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError):  # what cannot be read does not compete
                manifests[step] = self.manifest(step)
        used = [manifest["best"] for manifest in manifests.values() if manifest.get("best")]
        metric, mode = (self.best, self.mode) if self.best or not used else used[-1]
        found, value = None, None
        for step, manifest in manifests.items():
            here = manifest["metrics"].get(metric)
            if here is not None and improves(here, value, mode=mode):
                found, value = step, here
        return found

    def manifest(self, step: int) -> dict[str, Any]:
        """What was written down when the checkpoint was committed.

        Raises:
            OSError, ValueError: it cannot be read, or is not what was written.
        """
        manifest = _read(self.path(step, MANIFEST))
        if manifest["step"] != step:
            raise ValueError(f"it is of step {manifest['step']}")
        return manifest

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, None if its bytes are those that were written."""
        try:
            for name, (size, checksum) in self.manifest(step)["files"].items():
                path = self.path(step, *_parts(name))
                if not _is_file(self.path(step), path):
                    return f"{name} is missing"
                if os.path.getsize(path) != size:
                    return f"{name} has {os.path.getsize(path)} bytes, not {size}"
                if _checksum(path) != checksum:
                    return f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (OSError, ValueError) as error:
            return f"{MANIFEST} is not what was written ({error})"
        return None

    # Loading

    def load(self, step: int, likes: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Trees by name, as `likes`; None as a like gives nested dicts.

        Args:
            step: of the checkpoint.
            likes: by name, a tree of the same structure, shapes and dtypes.
            partial: the checkpoint may hold more.
        """
        import orbax.checkpoint as ocp

        targets = {name: None if like is None else _orbax(like) for name, like in likes.items()}
        items: dict[str, Any] = {}
        for name, target in targets.items():
            if target is None or (jax.tree.leaves(target) and not partial):
                items[name] = ocp.args.StandardRestore(target)
            elif jax.tree.leaves(target):
                how = ocp.checkpoint_utils.construct_restore_args(target)
                items[name] = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self.path(step), args=ocp.args.Composite(**items)) if items else {}
        return {name: _filled(like, found[name] if name in items else None) for name, like in likes.items()}

    def host(self, step: int) -> bytes:
        """The bytes that were saved beside the trees: this process's own, if as many saved."""
        names = [_host(process) for process in range(jax.process_count())]
        there = _names(self.path(step))
        as_many = set(names) <= there and _host(len(names)) not in there
        with open(self.path(step, names[jax.process_index()] if as_many else HOST), "rb") as file:
            return file.read()

    # Saving

    def save(self, step: int, trees: dict[str, Any], host: bytes, metrics: dict[str, float]) -> None:
        """Begins to save; returns when the arrays may be changed. Waits for the save before.

        Args:
            step: of the checkpoint.
            trees: by name; trees without arrays are left out.
            host: bytes beside them, of this process.
            metrics: the values that the checkpoint competes with.
        """
        import orbax.checkpoint as ocp

        self.wait()
        items = {name: _orbax(tree) for name, tree in trees.items()}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items() if jax.tree.leaves(item)}
        self._saved = step
        try:
            processes.first(self._make_room, step)
            if self._checkpointer is None:
                self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            if not processes.writes():  # before Orbax's own save, whose end all processes wait for
                with open(self.path(_SAVING, f"{step}.{_host(jax.process_index())}"), "wb") as file:
                    file.write(host)
            self._checkpointer.save(self.path(_SAVING, step), args=ocp.args.Composite(**args))
        except FileExistsError:
            raise
        except Exception as error:
            self._failure = error
            self.wait()
        self._commit = threading.Thread(target=self._finish, args=(step, host, metrics), name="onstep-commit")
        self._commit.start()

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
            RuntimeError: it failed; the message has step, path and reason. What was saved before stands.
        """
        if self._commit is not None:
            self._commit.join()
            self._commit = None
        step, self._saved = self._saved, None
        if step is None or processes.failed():
            return
        error, self._failure = self._failure, None
        said = None if error is None else f"{type(error).__name__}: {str(error)[:2000]}"
        said = next((text for text in processes.agree(said, f"the checkpoint of step {step}") if text), None)
        if said is not None:
            if processes.writes():
                with contextlib.suppress(OSError):
                    self.clean()
            raise RuntimeError(
                f"The checkpoint of step {step} in {self.directory} could not be saved: {said}"
            ) from error

    def close(self) -> None:
        """Waits, and ends what was begun."""
        try:
            self.wait()
        finally:
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                checkpointer.close()
                with contextlib.suppress(OSError):
                    os.rmdir(self.path(_SAVING))

    def _make_room(self, step: int) -> None:
        if os.path.lexists(self.path(step)):
            raise FileExistsError(f"{self.path(step)} is there already, and no checkpoint of this run.")
        if self._checkpointer is None:
            self.clean()
        os.makedirs(self.path(_SAVING, "writable"))  # Orbax would wait long for a folder that it cannot make
        os.rmdir(self.path(_SAVING, "writable"))

    def _finish(self, step: int, host: bytes, metrics: dict[str, float]) -> None:
        """The true commit, beside the running steps: checksums, manifest, rename; then old ones go."""
        try:
            self._checkpointer.wait_until_finished()
            if not processes.writes():
                return
            path = self.path(_SAVING, step)
            with open(os.path.join(path, HOST), "wb") as file:
                file.write(host)
            for process in range(1, jax.process_count()):
                os.rename(f"{path}.{_host(process)}", os.path.join(path, _host(process)))
            files = {name: [os.path.getsize(file), _checksum(file)] for name, file in _files(path)}
            best = [self.best, self.mode] if self.best else None
            manifest = {"format": 1, "run": self.run, "step": step, "best": best, "metrics": metrics, "files": files}
            with open(os.path.join(path, MANIFEST), "w") as file:
                file.write(_sealed(manifest))
                file.flush()
                os.fsync(file.fileno())
            os.rename(path, self.path(step))
            self.prune()
        except BaseException as error:
            self._failure = error

    def prune(self) -> None:
        """Deletes this run's checkpoints that are neither among the newest nor the best."""
        steps = self.steps()
        stay = {*steps[-self.keep :], self.spared, self.best_step() if self.best else None} if self.keep else set(steps)
        for step in steps:
            with contextlib.suppress(OSError, ValueError):  # not ours to judge: it stays
                if step not in stay and self.manifest(step)["run"] == self.run:
                    trash = self.path(f"{step}.{uuid.uuid4().hex}{_TRASH}")
                    os.rename(self.path(step), trash)
                    _delete(trash)

    def clean(self) -> None:
        """Removes what killed saves and deletions left."""
        if os.path.isdir(self.path(_SAVING)) and not os.path.islink(self.path(_SAVING)):
            shutil.rmtree(self.path(_SAVING))
        for name in _names(self.directory):
            if re.fullmatch(rf"\d+(\.[0-9a-f]+)?{re.escape(_TRASH)}", name) and not os.path.islink(self.path(name)):
                with contextlib.suppress(OSError, ValueError):
                    _delete(self.path(name))

    def move_aside(self, steps: list[int]) -> None:
        """Makes room: nothing is removed, and no name is used twice."""
        for step in steps:
            os.makedirs(self.path(_ASIDE), exist_ok=True)
            names = (str(step) if n == 1 else f"{step}.{n}" for n in itertools.count(1))
            free = next(name for name in names if not os.path.lexists(self.path(_ASIDE, name)))
            os.rename(self.path(step), self.path(_ASIDE, free))


def _host(process: int) -> str:
    return HOST if process == 0 else f"host.{process}.npz"


def _orbax(tree: Any) -> dict[str, Any]:
    """As Orbax takes it: no bare array, and None for arrays of size 0, which it refuses."""

    def convert(leaf: Any) -> Any:
        return leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)

    return {"tree": jax.tree.map(lambda leaf: convert(leaf) if np.size(leaf) else None, tree)}


def _filled(like: Any, found: Any) -> Any:
    """The tree that was found, in the structure of `like`; what Orbax was not given is taken from it."""
    if like is None:
        return found["tree"]
    leaves = iter(jax.tree.leaves(found))
    return jax.tree.map(lambda leaf: next(leaves) if np.size(leaf) else leaf, like)


def _names(path: str) -> set[str]:
    return set(os.listdir(path)) if os.path.isdir(path) else set()


def _files(path: str) -> Iterator[tuple[str, str]]:
    """The files below a path: their names in it, with slashes, and where they are."""
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            file = os.path.join(folder, name)
            yield os.path.relpath(file, path).replace(os.sep, "/"), file


def _parts(name: str) -> list[str]:
    """A file's name in a manifest as parts of a path; one that leads outside is refused."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or os.path.isabs(name) or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file in a checkpoint")
    return parts


def _checksum(path: str) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sealed(manifest: dict[str, Any]) -> str:
    """A manifest as text that holds its own checksum."""
    return json.dumps({**manifest, "checksum": zlib.crc32(json.dumps(manifest).encode())})


def _read(path: str) -> dict[str, Any]:
    """The manifest in a file; ValueError if one character of it is not as written."""
    with open(path, encoding="ascii") as file:
        text = file.read()
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) is None or _sealed(manifest) != text:
        raise ValueError("its checksum is another")
    return manifest


def _is_file(folder: str, path: str) -> bool:
    """Whether a path is a plain file, in the folder without a link on the way."""
    inside = os.path.join(os.path.realpath(folder), os.path.relpath(path, folder))
    return os.path.isfile(path) and not os.path.islink(path) and os.path.realpath(path) == inside


def _delete(path: str) -> None:
    """Deletes the files that a checkpoint's manifest lists, and the folders that this empties."""
    manifest = os.path.join(path, MANIFEST)
    if os.path.lexists(manifest):
        files = [os.path.join(path, *_parts(name)) for name in _read(manifest)["files"]]
        for file in files:
            if _is_file(path, file):
                os.unlink(file)
        os.unlink(manifest)
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # something of somebody else's is in it
            os.rmdir(folder)
