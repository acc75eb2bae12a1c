"""Save a run with Orbax and go on from it."""

from __future__ import annotations

import itertools
import os
from typing import Any

import jax
import numpy as np
from onstep import Cadence, Callback, Loop, Snapshot, every
from onstep.checks import whole


class Checkpoint(Callback):
    """Saves the whole run, in the background, and goes on from the newest save.

    A checkpoint holds the state, every callback's carry and host state, the counters, the
    position in the data and the open means: what is resumed ends in the bytes of a run that was
    never interrupted. One directory is one run. Nothing is written before the first save, and
    a run that is over is left as it is.

    Args:
        directory: the run's; made at the first save. Checkpoint N is in `<directory>/N`.
        when: when to save; the end of a run is saved whatever this says.
        keep: how many of the newest checkpoints stay.
        resume: True goes on from the newest checkpoint, if there is one; a step, from that one;
            later ones are then moved to `<directory>/aside`. False refuses a directory that holds a run.
        name: the callback's name.

    Raises:
        FileExistsError: the directory holds a run, and `resume` is False (when a run begins).
        FileNotFoundError: there is no checkpoint of the step asked for.
        ValueError: the checkpoint is of another state, rng, or set of carries; or `keep` < 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        keep: int = 3,
        resume: bool | int = True,
        name: str | None = None,
    ):
        whole("Checkpoint", "keep", keep, 1)
        self.directory = os.path.abspath(directory)
        self.when, self.keep, self.resume, self.name = when, keep, resume, name
        self._manager: Any = None

    def on_load(self, loop: Loop) -> None:
        steps = _steps(self.directory)
        if loop.step:  # the run goes on from a Result
            if steps and steps[-1] > loop.step:
                raise FileExistsError(
                    f"Checkpoint: {self.directory} holds a run at step {steps[-1]}, beyond the {loop.step} of this one."
                )
        elif steps and self.resume is False:
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}. "
                "Go on with it (resume=True) or give another directory."
            )
        elif self.resume is not True and self.resume is not False:
            if self.resume not in steps:
                raise FileNotFoundError(f"Checkpoint: no step {self.resume} in {self.directory}; it holds {steps}.")
            loop.restore(self._read(self.resume))
        elif steps:
            loop.restore(self._read(steps[-1]))

    def on_run_begin(self, loop: Loop) -> None:
        self._began = loop.step

    def on_save(self, loop: Loop) -> None:
        snapshot = loop.snapshot()
        if self._manager is None:
            _move_aside(self.directory, [step for step in _steps(self.directory) if step > self._began])
            self._manager = _open(self.directory, self.keep)
        _save(self._manager, snapshot.step, {**snapshot.tree, "host": np.frombuffer(snapshot.host, np.uint8)})

    def on_run_end(self, loop: Loop) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with manager:  # closes it
                manager.wait_until_finished()

    def _read(self, step: int) -> Snapshot:
        with _open(self.directory, self.keep) as manager:
            host = _restore(manager, step, {"host": None})["host"].tobytes()

        def load(like: dict[str, Any]) -> dict[str, Any]:
            with _open(self.directory, self.keep) as manager:
                return _restore(manager, step, like)

        return Snapshot(step, load, host)


def save(directory: str | os.PathLike[str], tree: Any, step: int = 0) -> None:
    """Saves a pytree of arrays by itself, without a run; returns when it is on disk.

    Raises:
        FileExistsError: the directory holds that step.
        ValueError: there is no array in the tree.
    """
    directory = os.path.abspath(directory)
    if not jax.tree.leaves(_orbax(tree)):
        raise ValueError(f"save needs a tree with arrays in it, got {tree!r:.80}.")
    if step in _steps(directory):
        raise FileExistsError(f"save: {directory} holds step {step}. Give another step or directory.")
    with _open(directory, keep=None) as manager:
        _save(manager, step, {"state": tree})


def load(directory: str | os.PathLike[str], like: Any = None, step: int | None = None) -> Any:
    """Loads what `save` saved, or the state of a run's checkpoint.

    Args:
        directory: of `save` or of a run.
        like: a tree of the same structure, shapes and dtypes; without it nested dicts come back.
        step: which; the newest without.

    Raises:
        FileNotFoundError: there is no such step.
    """
    directory, steps = os.path.abspath(directory), _steps(os.path.abspath(directory))
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise FileNotFoundError(f"load: no step {step} in {directory}; it holds {steps}.")
    with _open(directory, keep=None) as manager:
        return _restore(manager, step, {"state": like})["state"]


def _steps(directory: str) -> list[int]:
    """The steps in a directory, oldest first; Orbax gives a save its number when it is complete."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(int(name) for name in names if name.isdecimal())


def _open(directory: str, keep: int | None) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    )


def _save(manager: Any, step: int, trees: dict[str, Any]) -> None:
    from orbax.checkpoint import args

    items = {name: args.StandardSave(_orbax(tree)) for name, tree in trees.items() if jax.tree.leaves(_orbax(tree))}
    if not manager.save(step, args=args.Composite(**items)):
        raise RuntimeError(f"Orbax did not save step {step} in {manager.directory}.")


def _restore(manager: Any, step: int, likes: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import args

    targets = {name: None if like is None else _orbax(like) for name, like in likes.items()}
    items = {name: args.StandardRestore(t) for name, t in targets.items() if t is None or jax.tree.leaves(t)}
    found = manager.restore(step, args=args.Composite(**items)) if items else {}
    trees = {}
    for name, like in likes.items():
        filled = iter(jax.tree.leaves(found[name]) if name in items else ())
        if like is None:
            trees[name] = found[name]["tree"]
        else:
            trees[name] = jax.tree.map(lambda leaf, filled=filled: next(filled) if np.size(leaf) else leaf, like)
    return trees


def _orbax(tree: Any) -> dict[str, Any]:
    """As Orbax takes it: no bare array, and None for arrays of size 0, which it refuses."""

    def convert(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)

    return {"tree": jax.tree.map(lambda leaf: convert(leaf) if np.size(leaf) else None, tree)}


def _move_aside(directory: str, steps: list[int]) -> None:
    """Makes room for a run that goes on from an earlier step; nothing is removed."""
    for step in steps:
        aside = os.path.join(directory, "aside")
        os.makedirs(aside, exist_ok=True)
        names = (str(step) if n == 1 else f"{step}.{n}" for n in itertools.count(1))
        free = next(name for name in names if not os.path.lexists(os.path.join(aside, name)))
        os.rename(os.path.join(directory, str(step)), os.path.join(aside, free))
