"""Save and load one pytree, without a run."""

from __future__ import annotations

import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .. import processes
from ..snapshot import pack, unpack
from ..trees import compare_signatures, named_leaves, signature
from .checkpoints import Checkpoints
from .lock import Lock
from .orbax_trees import check_storable
from .writer import CheckpointWriter

TRIES = 20
"""How often `load` tries again with a newer checkpoint, when a run deletes the one that it is reading."""


def save(directory: str | os.PathLike[str], tree: Any, step: int = 0, *, lock: bool = True) -> None:
    """Save a pytree of arrays without a run, such as the parameters to publish; return when it is on disk.

    With several processes, all must call it.

    Args:
        directory: created if it does not exist.
        tree: a pytree with at least one array.
        step: the number of the checkpoint, for several trees in one directory.
        lock: False does not lock the directory, for file systems without `flock`.

    Raises:
        FileExistsError: the directory already holds that step.
        OSError: the file system cannot lock the directory.
        RuntimeError: another live process is writing to the directory, or the tree could not be saved.
        TypeError: a leaf cannot be stored.
        ValueError: the tree has no arrays.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> save(directory.name, {"w": jnp.arange(3)})
    >>> load(directory.name, {"w": jnp.zeros(3, jnp.int32)})["w"].tolist()
    [0, 1, 2]
    >>> directory.cleanup()
    """
    writer = CheckpointWriter(directory)
    checkpoints = writer.checkpoints
    if not any(np.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"save needs a tree with arrays in it, got {tree!r:.80}.")
    check_storable(tree)
    trees, guard = {"state": tree}, Lock(checkpoints.directory)

    def begin() -> None:
        if step in checkpoints.steps():
            raise FileExistsError(
                f"save: {checkpoints.directory} already holds step {step}. Use another step or directory."
            )
        if lock:
            guard.acquire()

    processes.first(begin)
    try:
        writer.save(step, trees, pack({"tree": _exact_signature(trees)}, "save"))
        writer.close()
    finally:
        guard.release()


def load(directory: str | os.PathLike[str], like: Any = None, step: int | Literal["best"] | None = None) -> Any:
    """Load what `save` saved, or the state of a run's checkpoint, and verify its checksums.

    You may load while a run writes to the directory. If the run deletes the checkpoint in the meantime, the next
    newest (or best) one is loaded. With several processes, all must call it.

    Args:
        directory: the one passed to `save`, or the directory of a run.
        like: a tree of the same structure, shapes and dtypes, of arrays or of `jax.ShapeDtypeStruct` (what
            `jax.eval_shape` returns), with a sharding for many devices. None returns nested dicts. A number or a
            numpy array in it may have the dtype to which JAX converts it. Without a sharding, an array gets the one
            that it was saved with, or the default device for small trees and where the saved devices do not exist.
        step: which checkpoint; the newest by default. `"best"` is the best by the metric and mode of the run.

    Returns:
        The tree, with the structure of `like`.

    Raises:
        FileNotFoundError: there is no such step, or no checkpoint has a value of the metric.
        RuntimeError: the checkpoints are deleted faster than they can be read.
        ValueError: the checkpoint is damaged, or `like` has another structure, shape or dtype. Nothing is cast.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> save(directory.name, {"w": jnp.arange(3)}, step=8)
    >>> load(directory.name)["w"].tolist()
    [0, 1, 2]
    >>> directory.cleanup()
    """
    checkpoints = Checkpoints(directory)

    def find() -> int | None:
        """Return the step to load, None if a run has just deleted it."""
        steps = checkpoints.steps()
        found = checkpoints.best_step() if step == "best" else steps[-1] if step is None and steps else step
        if found is None or found not in steps:
            if checkpoints.steps() != steps:
                return None
            if not steps:
                raise FileNotFoundError(f"load: {checkpoints.directory} holds no checkpoint.")
            if found is None:
                raise FileNotFoundError(
                    f"load: no checkpoint in {checkpoints.directory} counts as best: it holds {steps}, saved without a "
                    "value of the metric. Pass step=, or save with Checkpoint(..., best=metric)."
                )
            raise FileNotFoundError(f"load: no step {step} in {checkpoints.directory}; it holds {steps}.")
        damage = checkpoints.damage(found)
        if damage and os.path.isdir(checkpoints.path(found)):
            raise ValueError(f"load: {checkpoints.path(found)} is damaged: {damage}.")
        return None if damage else found

    for _ in range(TRIES):
        found, tree, failure = processes.first(find), None, None
        if found is None:
            continue
        try:
            tree = _read(checkpoints, found, like)
        except Exception as error:
            failure = error
        processes.agree(None, "while loading a checkpoint")  # all have read it
        if processes.first(os.path.isdir, checkpoints.path(found)):  # otherwise files were missing while it was read
            if failure is not None:
                raise failure
            return tree
    raise RuntimeError(
        f"load: a run deletes the checkpoints in {checkpoints.directory} before they are read. Raise its keep=."
    )


def _read(checkpoints: Checkpoints, step: int, like: Any) -> Any:
    """Return the state of a checkpoint.

    Raises:
        ValueError: `like` does not fit it.
    """
    path, host, likes = checkpoints.path(step), checkpoints.host(step), {"state": like}
    if like is not None and host:  # a tree that an early version of `save` wrote has none
        tree = unpack(host)["tree"]
        likes = _fitting(likes, {name: tree[name] for name in tree if name.split("/")[0] in likes}, path)
    try:
        return checkpoints.load(step, likes)["state"]
    except ValueError as error:
        raise ValueError(f"load: {path} does not fit like: {error}") from error


def _fitting(likes: Any, stored: dict[str, str], path: str) -> Any:
    """Return `likes` with numbers and numpy arrays converted as JAX does, where the checkpoint stores that.

    Raises:
        ValueError: something else is stored.
    """
    exact, converted = _exact_signature(likes), signature(likes)
    fits = {name: exact[name] != stored.get(name) == converted[name] for name in converted}
    flat = [jnp.zeros_like(leaf) if fits[name] else leaf for name, leaf in named_leaves(likes).items()]
    fitting = jax.tree.unflatten(jax.tree.structure(likes), flat)
    if changed := compare_signatures(stored, _exact_signature(fitting)):
        raise ValueError(f"load: {path} does not fit like (stored, then like): {changed}.")
    return fitting


def _exact_signature(tree: Any) -> dict[str, str]:
    """Return shapes and exact dtypes by name, unconverted; `signature` has the dtypes to which JAX converts them."""
    arrays = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    return {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in arrays.items()}
