"""What Orbax needs: one user at a time, and pytrees in the form that it can store."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..trees import named_leaves

ORBAX = threading.Lock()
"""Held while Orbax saves or loads: it hangs, or fails, when two threads of a process use it at once."""

MOST_BYTES = 1 << 28
"""How much `read_arrays` reads at once, unless a single array is larger."""

_STORABLE = frozenset(map(np.dtype, ("bool", "int32", "int64", "uint8", "uint32", "float16", "float32", "float64")))
"""Common dtypes that Orbax can store. Others need TensorStore, which takes a while to import, to tell."""


def check_storable(tree: Any) -> None:
    """Check that Orbax can store every leaf of a tree.

    Raises:
        TypeError: it cannot; the message names the first such leaf.

    >>> check_storable({"w": np.zeros(2), "codes": jax.numpy.zeros(2, "uint4")})
    Traceback (most recent call last):
    ...
    TypeError: A checkpoint cannot hold the leaf 'codes' of dtype uint4. Convert it, or keep it out of the tree.
    """
    for name, leaf in named_leaves(tree).items():
        dtype = leaf.dtype if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf).dtype
        if not _is_storable(dtype):
            raise TypeError(
                f"A checkpoint cannot hold the leaf {name!r} of dtype {dtype}. Convert it, or keep it out of the tree."
            )


def _is_storable(dtype: Any) -> bool:
    """Return whether Orbax can store arrays of a dtype: that of random keys, or one that TensorStore has as well."""
    if dtype in _STORABLE or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    if dtype.kind in "OSUMm" or dtype.names:
        return False
    import tensorstore

    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return True


def to_orbax(tree: Any) -> dict[str, Any]:
    """Return a tree as Orbax can store it: never a bare array, and None for arrays of size 0, which it refuses."""

    def convert(leaf: Any) -> Any:
        return leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)

    return {"tree": jax.tree.map(lambda leaf: convert(leaf) if np.size(leaf) else None, tree)}


def from_orbax(found: dict[str, Any], like: Any) -> Any:
    """Return the leaves that Orbax restored in the structure of `like`, with its arrays of size 0.

    Leaves are matched by name, so dicts and named tuples with the same names fit each other.
    """
    restored = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found.get("tree"))}
    paths = jax.tree_util.tree_leaves_with_path(like)
    leaves = [restored[_names(path)] if np.size(leaf) else leaf for path, leaf in paths]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_arrays(folder: str, tree: str, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield arrays of a saved tree by name, in this order. Only a part of them is in memory at the same time.

    Args:
        folder: the checkpoint.
        tree: the name of the tree, such as `"state"`.
        names: the paths of the arrays, which begin with the name of the tree.
    """
    import orbax.checkpoint as ocp

    path = os.path.join(folder, tree)
    with ORBAX, contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = {tree: handler.metadata(Path(path)).tree["tree"]}
    kinds = {name: jax.ShapeDtypeStruct(kind.shape, kind.dtype) for name, kind in named_leaves(saved).items()}
    how, structure = ocp.RestoreArgs(restore_type=np.ndarray), jax.tree.structure(saved)

    def read(group: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        item = jax.tree.unflatten(structure, [kinds[name] if name in group else ocp.PLACEHOLDER for name in kinds])
        item = {"tree": item[tree]}
        with ORBAX, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(lambda _: how, item))
            found = dict(zip(kinds, jax.tree.leaves(checkpointer.restore(path, args=args)), strict=True))
        return ((name, found[name]) for name in group)

    group, size = list[str](), 0
    for name in names:
        more = kinds[name].size * kinds[name].dtype.itemsize
        if group and size + more > MOST_BYTES:
            yield from read(group)
            group, size = [], 0
        group.append(name)
        size += more
    yield from read(group)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return a path as strings, which are the same for a key of a dict and for a field."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
