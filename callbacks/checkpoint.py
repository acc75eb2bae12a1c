"""Save a run with Orbax and go on from it."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import jax
import numpy as np
from onstep import Cadence, Callback, Loop, Record, Snapshot, every
from onstep.checks import whole
from onstep.storage import Storage


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
        ValueError: the checkpoint is of another run or damaged; or an argument is out of range.
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
        self.directory = os.path.abspath(directory)
        self.keep, self.best, self.mode = keep, best, mode
        self.resume, self.overwrite, self.strict, self.skip = resume, overwrite, strict, skip
        self.when, self.name = when, name
        self._recorded: tuple[int, float] | None = None  # the newest value of `best`, with its step

    def on_load(self, loop: Loop) -> None:
        self._storage = Storage(self.directory, self.keep, self.best, self.mode)
        self._storage.lock()
        steps = self._storage.steps()
        if not steps or self.overwrite:
            return
        if loop.step:  # the run goes on from a Result
            if steps[-1] > loop.step:
                raise FileExistsError(
                    f"Checkpoint: {self.directory} holds a run at step {steps[-1]}, beyond the {loop.step} of this one."
                )
            self._goes_on(self._newest_intact(steps))
        elif self.resume is False:
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}. Go on with it (resume=True), "
                "move it aside (overwrite=True) or give another directory."
            )
        else:
            step = self._newest_intact(steps) if self.resume is True else self._asked_for(steps)
            self._goes_on(step)
            loop.restore(self._read(step), strict=self.strict, skip=self.skip)

    def on_run_begin(self, loop: Loop) -> None:
        self._recorded, self._began, self._saved = None, loop.step, False

    def on_log(self, loop: Loop, record: Record) -> None:
        if self.best in record.values:
            self._recorded = (record.step, record.values[self.best])

    def on_save(self, loop: Loop) -> None:
        snapshot = loop.snapshot()
        if not self._saved:
            later = [step for step in self._storage.steps() if step > self._began or self.overwrite]
            self._storage.move_aside(later)
            self._saved = True
        competes = self._recorded is not None and self._recorded[0] == snapshot.step
        metrics = {self.best: self._recorded[1]} if self.best and self._recorded and competes else {}
        self._storage.save(snapshot.step, snapshot.tree, snapshot.host, metrics)

    def on_run_end(self, loop: Loop) -> None:
        try:
            self._storage.close()
        finally:
            self._storage.unlock()

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

    def _goes_on(self, step: int) -> None:
        self._storage.run = self._storage.manifest(step)["run"]
        self._storage.spared = step

    def _read(self, step: int) -> Snapshot:
        load = functools.partial(self._storage.load, step, partial=not self.strict)
        return Snapshot(step, load, self._storage.host(step))


def save(directory: str | os.PathLike[str], tree: Any, step: int = 0) -> None:
    """Saves a pytree of arrays by itself, without a run; returns when it is on disk.

    Raises:
        FileExistsError: the directory holds that step.
        ValueError: there is no array in the tree.
    """
    storage = Storage(os.fspath(directory))
    if not any(np.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"save needs a tree with arrays in it, got {tree!r:.80}.")
    if step in storage.steps():
        raise FileExistsError(f"save: {storage.directory} holds step {step}. Give another step or directory.")
    storage.lock()
    try:
        storage.save(step, {"state": tree}, b"", {})
        storage.close()
    finally:
        storage.unlock()


def load(directory: str | os.PathLike[str], like: Any = None, step: int | None = None) -> Any:
    """Loads what `save` saved, or the state of a run's checkpoint; verifies its checksums.

    Args:
        directory: of `save` or of a run.
        like: a tree of the same structure, shapes and dtypes; without it nested dicts come back.
        step: which; the newest without.

    Raises:
        FileNotFoundError: there is no such step.
        ValueError: it is damaged.
    """
    storage = Storage(os.fspath(directory))
    steps = storage.steps()
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise FileNotFoundError(f"load: no step {step} in {storage.directory}; it holds {steps}.")
    if damage := storage.damage(step):
        raise ValueError(f"load: {storage.path(step)} is damaged: {damage}.")
    return storage.load(step, {"state": like})["state"]
