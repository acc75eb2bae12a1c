"""Save a run with Orbax and go on from it."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Loop, Record, Snapshot, every, processes
from onstep.checks import appeared, watched, whole
from onstep.lock import Lock
from onstep.snapshot import pack, unpack
from onstep.storage import Storage
from onstep.trees import compare, leaves, signature


class Checkpoint(Callback):
    """Saves the whole run, in the background, and goes on from the newest save.

    A checkpoint holds the state, every callback's carry and host state, the counters, the
    position in the data and the open means: what is resumed ends in the bytes of a run that was
    never interrupted. One directory is one run: `<directory>/N` is the checkpoint of step N, with
    checksums that are verified when it is read. A run that is over is left as it is.

    Args:
        directory: the run's.
        when: when to save; the end of a run is saved whatever this says.
        keep: how many of the newest checkpoints stay.
        best: the metric by which one more stays: the best of those whose own step recorded it.
        mode: `"min"` or `"max"`, of `best`.
        resume: True goes on from the newest intact checkpoint, if there is one; a step or `"best"`,
            from that one, and later ones are moved to `<directory>/aside`. False refuses a
            directory that holds a run.
        overwrite: True starts afresh; the checkpoints of an earlier run are moved aside at the
            first save.
        strict: False lets callbacks with a carry come and go between runs: one that is new begins
            afresh, the carry of one that went is left out.
        skip: False reads the data from their beginning after a resume, for a source that has no
            position to go to, such as a simulator.
        name: the callback's name.

    Raises:
        FileExistsError: the directory holds a run, and `resume` is False.
        FileNotFoundError: there is no checkpoint of the step asked for.
        RuntimeError: another run that is alive writes the directory; no checkpoint is intact; or a
            save failed, at the next save or the run's end.
        ValueError: the checkpoint is of another run or damaged; an argument is out of range; or,
            when the run ends, the metric `best` never appeared. What was saved stands.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        keep: int = 3,
        best: str | None = None,
        mode: str = "min",
        resume: bool | int | str = True,
        overwrite: bool = False,
        strict: bool = True,
        skip: bool = True,
        name: str | None = None,
    ):
        whole("Checkpoint", "keep", keep, 1)
        if mode not in ("min", "max"):
            raise ValueError(f"Checkpoint needs mode 'min' or 'max', got {mode!r}.")
        if not isinstance(resume, (bool, int)) and not (resume == "best" and best):
            raise ValueError(f"Checkpoint needs resume=True, False, a step, or 'best' with best=, got {resume!r}.")
        self.directory: str = os.path.abspath(directory)
        self.keep: int = keep
        self.best: str | None = best
        self.mode = mode
        self.overwrite: bool = overwrite
        self.strict: bool = strict
        self.skip: bool = skip
        self.resume = resume
        self.when: Cadence | int = when
        self.name: str | None = name
        self._recorded: tuple[int, float] | None = None  # the newest value of `best`, with its step

    def on_load(self, loop: Loop) -> None:
        self._storage, self._lock = Storage(self.directory, self.keep, self.best, self.mode), Lock(self.directory)
        processes.first(self._lock.acquire)
        step = self._storage.spared = processes.first(self._goes_on_from, loop.step)
        if step is not None and not loop.step:
            loop.restore(self._read(step), strict=self.strict, skip=self.skip)

    def on_run_begin(self, loop: Loop) -> None:
        self._recorded, self._began, self._saved = None, loop.step, False

    def on_log(self, loop: Loop, record: Record) -> None:
        if self.best in record.values:
            self._recorded = (record.step, record.values[self.best])

    def on_epoch_end(self, loop: Loop) -> None:
        if self.best:
            watched("Checkpoint", self.best, loop)

    def on_save(self, loop: Loop) -> None:
        snapshot = loop.snapshot()
        if not self._saved:
            processes.first(self._move_later)
            self._saved = True
        competes = self._recorded is not None and self._recorded[0] == snapshot.step
        metrics = {self.best: self._recorded[1]} if self.best and self._recorded and competes else {}
        self._storage.save(snapshot.step, snapshot.tree, snapshot.host, metrics)

    def on_run_end(self, loop: Loop) -> None:
        try:
            self._storage.close()
            if self.best:
                appeared("Checkpoint", self.best, loop)
                self._competed(loop, self.best)
        finally:
            self._lock.release()

    def _competed(self, loop: Loop, best: str) -> None:
        over = loop.error is None and loop.finished and self._saved
        if over and processes.writes() and best in loop.latest and self._storage.best_step() is None:
            warnings.warn(
                f"Checkpoint: none of {self._storage.steps()} in {self.directory} is the best, as no {best!r} was "
                "recorded at a step that was saved, or none that is finite. Give both the same cadence (when=...).",
                stacklevel=3,
            )

    def _goes_on_from(self, at: int) -> int | None:
        """The checkpoint that a run at step `at` goes on from, None if it begins anew."""
        steps = self._storage.steps()
        if not steps or self.overwrite:
            return None
        if at and steps[-1] > at:  # the run goes on from a Result
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}, beyond the {at} of this one."
            )
        if not at and self.resume is False:
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}. Go on with it (resume=True), "
                "move it aside (overwrite=True) or give another directory."
            )
        step = self._newest_intact(steps) if at or self.resume is True else self._asked_for(steps)
        self._storage.run = self._storage.manifest(step)["run"]
        return step

    def _move_later(self) -> None:
        self._storage.move_aside([step for step in self._storage.steps() if step > self._began or self.overwrite])

    def _newest_intact(self, steps: list[int]) -> int:
        for step in reversed(steps):
            damage = self._storage.damage(step)
            if damage is None:
                return step
            warnings.warn(f"Checkpoint {self._storage.path(step)} is damaged and left out: {damage}.", stacklevel=2)
        raise RuntimeError(f"Checkpoint: none of the checkpoints {steps} in {self.directory} is intact.")

    def _asked_for(self, steps: list[int]) -> int:
        step = self._storage.best_step() if self.resume == "best" else self.resume
        if step not in steps:
            raise FileNotFoundError(f"Checkpoint: no step {self.resume} in {self.directory}; it holds {steps}.")
        if damage := self._storage.damage(step):
            raise ValueError(f"Checkpoint {self._storage.path(step)} is damaged: {damage}.")
        return step

    def _read(self, step: int) -> Snapshot:
        load = functools.partial(self._storage.load, step, partial=not self.strict)
        return Snapshot(step, load, self._storage.host(step))


def save(directory: str | os.PathLike[str], tree: Any, step: int = 0) -> None:
    """Saves a pytree of arrays by itself, without a run; returns when it is on disk. All processes call it.

    Raises:
        FileExistsError: the directory holds that step.
        ValueError: there is no array in the tree.
    """
    storage = Storage(os.fspath(directory))
    if not any(np.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"save needs a tree with arrays in it, got {tree!r:.80}.")
    trees, lock = {"state": tree}, Lock(storage.directory)

    def begin() -> None:
        if step in storage.steps():
            raise FileExistsError(f"save: {storage.directory} holds step {step}. Give another step or directory.")
        lock.acquire()

    processes.first(begin)
    try:
        storage.save(step, trees, pack({"tree": _kinds(trees)}, "save"), {})
        storage.close()
    finally:
        lock.release()


def load(directory: str | os.PathLike[str], like: Any = None, step: int | Literal["best"] | None = None) -> Any:
    """Loads what `save` saved, or the state of a run's checkpoint; verifies its checksums. All processes call it.

    Args:
        directory: of `save` or of a run.
        like: a tree of the same structure, shapes and dtypes, of arrays or of what `jax.eval_shape`
            gives, with a sharding on many devices; without it nested dicts come back.
            A number or a numpy array in it may have the dtype that JAX makes of it.
        step: which; the newest without. `"best"`, the best by the metric and mode of the run.

    Raises:
        FileNotFoundError: there is no such step, or none has a value to be the best by.
        ValueError: it is damaged; or another tree, shape or dtype than `like`. Nothing is cast.
    """
    storage = Storage(os.fspath(directory))

    def find() -> int:
        steps = storage.steps()
        found = storage.best_step() if step == "best" else steps[-1] if step is None and steps else step
        if found is None or found not in steps:
            raise FileNotFoundError(f"load: no step {step} in {storage.directory}; it holds {steps}.")
        if damage := storage.damage(found):
            raise ValueError(f"load: {storage.path(found)} is damaged: {damage}.")
        return found

    found = processes.first(find)
    host, likes = storage.host(found), {"state": like}
    if like is not None and host:  # a tree that `save` of an earlier version wrote has none
        tree = unpack(host)["tree"]
        likes = _fitting(likes, {name: tree[name] for name in tree if name.split("/")[0] in likes}, storage.path(found))
    try:
        return storage.load(found, likes)["state"]
    except ValueError as error:
        raise ValueError(f"load: {storage.path(found)} does not fit like: {error}") from error


def _fitting(likes: Any, stored: dict[str, str], path: str) -> Any:
    """`likes`, where what is stored has the dtype that JAX makes of a number or a numpy array, as JAX makes it.

    Raises:
        ValueError: something else is stored.
    """
    exact, made = _kinds(likes), signature(likes)
    fits = {name: exact[name] != stored.get(name) == made[name] for name in made}
    flat = [jnp.zeros_like(leaf) if fits[name] else leaf for name, leaf in leaves(likes).items()]
    fitting = jax.tree.unflatten(jax.tree.structure(likes), flat)
    if changed := compare(stored, _kinds(fitting)):
        raise ValueError(f"load: {path} does not fit like (stored, then like): {changed}.")
    return fitting


def _kinds(tree: Any) -> dict[str, str]:
    """Shapes and dtypes by name as they are, where `signature` says what JAX makes of them."""
    arrays = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in leaves(tree).items()}
    return {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in arrays.items()}
