"""Writing checkpoints: saved in the background, committed by one rename, and deleted when newer ones replace them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from .. import processes
from .checkpoints import Checkpoints, host_name
from .files import names_in, write_file
from .manifest import delete_listed, describe_files, write_manifest
from .orbax_trees import ORBAX, check_storable, detach, finalize, new_handler, write

SAVING, ARCHIVE, TRASH = ".saving", "archive", ".trash"
ARCHIVE_0_1 = "aside"
"""The archive's name in version 0.1."""

_saves = itertools.count()  # the number of the next save of any writer; the same in all processes


class CheckpointWriter:
    """Writes the checkpoints of a run to one directory, in the background, and deletes old ones.

    `save` returns once the arrays may be modified. A checkpoint is complete, with checksums, before it is renamed into
    place. The `Checkpoint` callback is built on this class; use it to save from your own loop. It does not lock the
    directory, so take a `Lock` first. With several processes, all must call `save`, `wait` and `close`.

    Args:
        directory: the directory of the run, created by the first save.
        keep: how many of the newest checkpoints to keep; None for all.
        best: a metric; the best checkpoint by it is kept as well.
        mode: whether `"min"` or `"max"` of that metric is best.
        keep_every: keep the first checkpoint of every `keep_every` steps for ever; None for none.

    Attributes:
        checkpoints: read-only access to the same directory.
        keep: how many of the newest checkpoints to keep; None for all.
        keep_every: keep the first checkpoint of every `keep_every` steps for ever; None for none.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> directory = tempfile.TemporaryDirectory()
    >>> writer = CheckpointWriter(directory.name, keep=1, best="loss")
    >>> for step, loss in ((10, 0.3), (20, 0.2), (30, 0.4), (40, 0.5)):
    ...     writer.save(step, {"state": {"w": jnp.full(2, step)}}, metrics={"loss": loss})
    >>> writer.close()
    >>> writer.checkpoints.steps(), writer.checkpoints.best_step()
    ([20, 40], 20)
    >>> directory.cleanup()
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = None,
        best: str | None = None,
        mode: str = "min",
        keep_every: int | None = None,
    ):
        self.checkpoints: Checkpoints = Checkpoints(directory, best=best, mode=mode)
        self.keep: int | None = keep
        self.keep_every: int | None = keep_every
        self._run = uuid.uuid4().hex  # a writer deletes no checkpoint of another run
        self._resumed: int | None = None
        self._handler: Any = None  # of Orbax, from the first save to `close`
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving: int | None = None  # the step of the last save, until `wait` has waited for it

    def resume_from(self, step: int) -> None:
        """Continue the run of a checkpoint: its checkpoints may be deleted when newer ones replace them.

        The checkpoint itself is never deleted by this writer, so you can resume from it again.

        Raises:
            OSError, ValueError: the checkpoint's manifest cannot be read.
        """
        self._run, self._resumed = self.checkpoints.manifest(step)["run"], step

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        host: bytes = b"",
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a save after the previous one has finished; return once the arrays may be modified.

        Args:
            step: the step of the checkpoint.
            trees: by name, pytrees of arrays; trees without arrays are left out.
            host: bytes to save with them; each process may pass its own.
            metrics: by name, the values recorded at this step, which decide which checkpoint is best.
            config: JSON values that describe how the run is configured, for the manifest.

        Raises:
            FileExistsError: the path of the checkpoint already exists.
            RuntimeError: the previous save failed.
            TypeError: Orbax cannot store a leaf.
        """
        self.wait()
        check_storable(trees)
        saved, is_copy = detach(trees)
        self._saving, number = step, next(_saves)
        try:
            processes.first(self._make_room, step)
        except Exception as error:
            if isinstance(error, FileExistsError):
                raise
            self._failure = error
            self.wait()
            return
        if self._handler is None:
            self._handler = new_handler()
        copied = threading.Event()  # set once the arrays may be modified
        manifest = self._manifest(step, metrics, config)
        self._thread = threading.Thread(
            target=self._finish, args=(step, number, saved, host, manifest, copied), name="onstep-commit"
        )
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left
            self._thread = None
            raise
        if not is_copy:
            copied.wait()

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
            RuntimeError: the save failed; the message has step, path and reason. Earlier checkpoints are intact.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        step, self._saving = self._saving, None
        if step is None or processes.failed():
            return
        error, self._failure = self._failure, None
        said = None if error is None else f"{type(error).__name__}: {str(error)[:2000]}"
        said = next((text for text in processes.agree(said, f"the checkpoint of step {step}") if text), None)
        if said is not None:
            if processes.writes():
                with contextlib.suppress(OSError):
                    self.clean()
            raise RuntimeError(f"The checkpoint of step {step} in {self._path()} could not be saved: {said}") from error

    def close(self) -> None:
        """Wait for the last save, and release what Orbax holds.

        Raises:
            RuntimeError: the last save failed.
        """
        try:
            self.wait()
        finally:
            handler, self._handler = self._handler, None
            if handler is not None:
                handler.close()
                with contextlib.suppress(OSError):
                    os.rmdir(self._path(SAVING))

    def prune(self) -> None:
        """Delete the checkpoints of this run that are not among the newest, the best, a milestone, or resumed from."""
        steps = self.checkpoints.steps()
        if not self.keep:
            return
        kept = {*steps[-self.keep :], self._resumed, self.checkpoints.best_step() if self.checkpoints.best else None}
        if self.keep_every is not None:
            first = {step // self.keep_every: step for step in reversed(steps)}
            kept |= {step for number, step in first.items() if number}
        for step in steps:
            with contextlib.suppress(OSError, ValueError):  # a damaged checkpoint is not deleted
                if step not in kept and self.checkpoints.manifest(step)["run"] == self._run:
                    trash = self._path(f"{step}.{uuid.uuid4().hex}{TRASH}")
                    os.rename(self._path(step), trash)
                    delete_listed(trash)

    def clean(self) -> None:
        """Delete leftovers of interrupted saves and deletions."""
        saving = self._path(SAVING)
        if os.path.islink(saving):
            raise OSError(f"{saving} is a symbolic link, and a run deletes the files in it. Remove the link.")
        if os.path.isdir(saving):
            shutil.rmtree(saving)
        for name in names_in(self._path()):
            if re.fullmatch(rf"\d+(\.[0-9a-f]+)?{re.escape(TRASH)}", name) and not os.path.islink(self._path(name)):
                with contextlib.suppress(OSError, ValueError):
                    delete_listed(self._path(name))

    def archive(self, steps: Iterable[int]) -> None:
        """Move checkpoints to `archive/`, as `N`, or `N.2` and so on if that name is taken."""
        for step in steps:
            os.makedirs(self._path(ARCHIVE), exist_ok=True)
            names = (str(step) if n == 1 else f"{step}.{n}" for n in itertools.count(1))
            free = next(name for name in names if not self._is_archived(name))
            os.rename(self._path(step), self._path(ARCHIVE, free))

    def _is_archived(self, name: str) -> bool:
        return any(os.path.lexists(self._path(folder, name)) for folder in (ARCHIVE, ARCHIVE_0_1))

    def _path(self, *parts: int | str) -> str:
        return self.checkpoints.path(*parts)

    def _make_room(self, step: int) -> None:
        if os.path.lexists(self._path(step)):
            raise FileExistsError(
                f"{self._path(step)} exists and is not a checkpoint of this run. Move it, or use another directory."
            )
        if self._handler is None:
            self.clean()
        os.makedirs(self._path(SAVING, step))

    def _manifest(
        self, step: int, metrics: Mapping[str, float] | None, config: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return the manifest of a checkpoint, but for its files."""
        best = [self.checkpoints.best, self.checkpoints.mode] if self.checkpoints.best else None
        values, described = dict(metrics or {}), dict(config or {})
        return {"run": self._run, "step": step, "best": best, "metrics": values, "config": described}

    def _finish(
        self, step: int, number: int, trees: Any, host: bytes, manifest: dict[str, Any], copied: threading.Event
    ) -> None:
        """Write and commit a checkpoint in the background. Then old checkpoints are deleted."""
        path = self._path(SAVING, step)
        try:
            with ORBAX:
                try:
                    write(self._handler, path, trees, copied)
                    write_file(os.path.join(path, host_name(jax.process_index())), host)
                except BaseException as error:
                    self._failure = error
                copied.set()
                failed = any(processes.gather(f"save/{number}", self._failure is not None))
                if failed or not processes.writes():
                    return
                finalize(self._handler, path)  # because all processes have written their parts
            write_manifest(path, manifest | {"files": describe_files(path)})
            os.rename(path, self._path(step))
            self.prune()
        except BaseException as error:
            self._failure = error
