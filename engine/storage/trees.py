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
from .writer import CheckpointWriter


def save(directory: str | os.PathLike[str], tree: Any, step: int = 0) -> None:
    """Save a pytree of arrays without a run, such as the parameters to publish; return when it is on disk.

    With several processes, all must call it.

    Args:
        directory: created if it does not exist.
        tree: a pytree with at least one array.
        step: the number of the checkpoint, for several trees in one directory.

    Raises:
        FileExistsError: the directory already holds that step.
        RuntimeError: another live process is writing to the directory, or the tree could not be saved.
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
    trees, lock = {"state": tree}, Lock(checkpoints.directory)

    def begin() -> None:
        if step in checkpoints.steps():
            raise FileExistsError(
                f"save: {checkpoints.directory} already holds step {step}. Use another step or directory."
            )
        lock.acquire()

    processes.first(begin)
    try:
        writer.save(step, trees, pack({"tree": _exact_signature(trees)}, "save"))
        writer.close()
    finally:
        lock.release()


def load(directory: str | os.PathLike[str], like: Any = None, step: int | Literal["best"] | None = None) -> Any:
    """Load what `save` saved, or the state of a run's checkpoint, and verify its checksums.

    With several processes, all must call it.

    Args:
        directory: the one passed to `save`, or the directory of a run.
        like: a tree of the same structure, shapes and dtypes, of arrays or of `jax.ShapeDtypeStruct` (what
            `jax.eval_shape` returns), with a sharding for many devices. None returns nested dicts. A number or a
            numpy array in it may have the dtype to which JAX converts it.
        step: which checkpoint; the newest by default. `"best"` is the best by the metric and mode of the run.

    Returns:
        The tree, with the structure of `like`.

    Raises:
        FileNotFoundError: there is no such step, or no checkpoint has a value of the metric.
        ValueError: the checkpoint is damaged, or `like` has another structure, shape or dtype. Nothing is cast.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> save(directory.name, {"w": jnp.arange(3)}, step=8)
    >>> load(directory.name)["w"].tolist()
    [0, 1, 2]
    >>> directory.cleanup()
    """
    checkpoints = Checkpoints(directory)

    def find() -> int:
        steps = checkpoints.steps()
        found = checkpoints.best_step() if step == "best" else steps[-1] if step is None and steps else step
        if found is None or found not in steps:
            raise FileNotFoundError(f"load: no step {step} in {checkpoints.directory}; it holds {steps}.")
        if damage := checkpoints.damage(found):
            raise ValueError(f"load: {checkpoints.path(found)} is damaged: {damage}.")
        return found

    found = processes.first(find)
    path, host, likes = checkpoints.path(found), checkpoints.host(found), {"state": like}
    if like is not None and host:  # a tree that an early version of `save` wrote has none
        tree = unpack(host)["tree"]
        likes = _fitting(likes, {name: tree[name] for name in tree if name.split("/")[0] in likes}, path)
    try:
        return checkpoints.load(found, likes)["state"]
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
