"""What Orbax needs: one user at a time, and pytrees in the form that it can store."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..placement import device_of, read
from ..trees import named_leaves
from .files import names_in

ORBAX = threading.Lock()
"""Held while Orbax saves or loads: it hangs, or fails, when two threads of a process use it at once."""

MOST_BYTES = 1 << 28
"""How much `read_arrays` reads at once, unless a single array is larger."""
METADATA = "_METADATA"
"""Orbax's description of a tree, in the folder of a checkpoint."""
SMALL = 2**25
"""Bytes up to which trees are saved as numpy arrays. Orbax's time for small trees is that for each of their arrays."""

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


def detach(trees: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return trees for Orbax to save, and whether they are copies, so that the originals may be modified at once.

    Trees without arrays are left out. Small trees become numpy arrays, except what is divided over devices: Orbax
    saves those in half the time. It copies them once more, and does not store their device.
    """
    found = {name: to_orbax(tree) for name, tree in trees.items()}
    found = {name: tree for name, tree in found.items() if jax.tree.leaves(tree)}
    leaves = jax.tree.leaves(found)
    if jax.process_count() > 1 or sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) > SMALL:
        return found, False
    alone = [isinstance(leaf, np.ndarray) or _is_on_one_device(leaf) for leaf in leaves]
    copies = [np.array(read(leaf)) if is_alone else leaf for leaf, is_alone in zip(leaves, alone, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(found), copies), all(alone)


def _is_on_one_device(leaf: jax.Array) -> bool:
    return len(leaf.sharding.device_set) == 1 and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_orbax(tree: Any) -> Any:
    """Return a tree as Orbax can store it: numbers as arrays, and None for arrays of size 0, which it refuses."""

    def convert(leaf: Any) -> Any:
        return leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)

    return jax.tree.map(lambda leaf: convert(leaf) if np.size(leaf) else None, tree)


def new_handler() -> Any:
    """Return what writes trees and describes saved ones. It can be used again for every save."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler()


def write(handler: Any, folder: str, trees: dict[str, Any], copied: threading.Event) -> None:
    """Write the part of this process to a folder that exists. `copied` is set once the arrays may be modified.

    Not with Orbax's `AsyncCheckpointer`, which does again what the writer does: a thread, barriers, a temporary folder
    for each tree, and renames.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    pending = asyncio.run(handler.async_save(epath.Path(folder), args=ocp.args.PyTreeSave(trees)))
    copied.set()
    for each in pending or ():
        each.result()


def finalize(handler: Any, folder: str) -> None:
    """Merge what all processes have written. Only one process calls it."""
    from etils import epath

    handler.finalize(epath.Path(folder))


def restore(folder: str, likes: Mapping[str, Any] | None, *, partial: bool) -> dict[str, Any]:
    """Return trees of a checkpoint by name, loaded by Orbax; see `Checkpoints.load`."""
    together = os.path.isfile(os.path.join(folder, METADATA))
    if likes is None:
        names = _describe(folder) if together else sorted(names_in(folder))
        likes = {name: None for name in names if together or METADATA in names_in(os.path.join(folder, name))}
    wanted = {name: like for name, like in likes.items() if like is None or jax.tree.leaves(to_orbax(like))}
    load = _restore_together if together else _restore_one_by_one
    found = load(folder, wanted, partial) if wanted else {}
    return {name: found[name] if like is None else _from_orbax(found.get(name), like) for name, like in likes.items()}


def _describe(folder: str) -> dict[str, Any]:
    """Return what Orbax knows about trees that were saved as one."""
    from etils import epath

    with ORBAX:
        return new_handler().metadata(epath.Path(folder)).tree


def _restore_together(folder: str, likes: dict[str, Any], partial: bool) -> dict[str, Any]:
    """Return trees that were saved as one."""
    import orbax.checkpoint as ocp

    saved = _describe(folder)
    target = {name: saved[name] if like is None else to_orbax(like) for name, like in likes.items()}
    how = ocp.checkpoint_utils.construct_restore_args(target, _shardings(target, saved))
    if not partial:  # Orbax compares the structure of all trees, also of those that it does not load
        others = {name: tree for name, tree in saved.items() if name not in likes}
        target |= jax.tree.map(lambda _: ocp.PLACEHOLDER, others)
        how |= jax.tree.map(lambda _: ocp.RestoreArgs(), others)
    with ORBAX, ocp.Checkpointer(new_handler()) as reader:
        return reader.restore(folder, args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=partial))


def _shardings(target: Any, saved: Any) -> Any:
    """Return where to load every leaf of a tree: None loads it as a numpy array.

    Args:
        target: arrays, `jax.ShapeDtypeStruct`, or what Orbax knows about saved arrays.
        saved: what Orbax knows about all saved arrays.
    """
    here = device_of(()) if jax.process_count() == 1 else None
    known = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}

    def choose(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return None
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and leaf.sharding is not None:
            return leaf.sharding
        found = getattr(known.get(_names(path)), "sharding", None)
        if found is None:  # it was saved as a numpy array; JAX would cut 64-bit numbers
            return here if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype else None
        try:
            return found.to_jax_sharding()
        except ValueError:  # its devices do not exist
            if here is None:
                raise
            return here

    return jax.tree_util.tree_map_with_path(choose, target)


def _restore_one_by_one(folder: str, likes: dict[str, Any], partial: bool) -> dict[str, Any]:
    """Return trees that version 0.1 saved, each in a folder of its own, below the key `tree`."""
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {}
    elsewhere = device_of(()) if jax.process_count() == 1 else None
    for name, like in likes.items():
        target = None if like is None else {"tree": to_orbax(like)}
        if target is None or not partial:
            items[name] = ocp.args.StandardRestore(target, fallback_sharding=elsewhere)
        else:
            how = ocp.checkpoint_utils.construct_restore_args(target)
            items[name] = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
    with ORBAX, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(folder, args=ocp.args.Composite(**items))
    return {name: found[name]["tree"] for name in items}


def _folders(folder: str) -> list[str]:
    """Return the names of the trees that version 0.1 saved."""
    return [name for name in names_in(folder) if METADATA in names_in(os.path.join(folder, name))]


def _from_orbax(found: Any, like: Any) -> Any:
    """Return the leaves that Orbax restored in the structure of `like`, with its arrays of size 0.

    Leaves are matched by name, so dicts and named tuples with the same names fit each other.
    """
    restored = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
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

    together = os.path.isfile(os.path.join(folder, METADATA))
    path = folder if together else os.path.join(folder, tree)
    saved = _describe(path)
    leaves = named_leaves(saved if together else {tree: saved["tree"]})
    kinds = {name: jax.ShapeDtypeStruct(kind.shape, kind.dtype) for name, kind in leaves.items()}
    how, structure = ocp.RestoreArgs(restore_type=np.ndarray), jax.tree.structure(saved)

    def read(group: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        item = jax.tree.unflatten(structure, [kinds[name] if name in group else ocp.PLACEHOLDER for name in kinds])
        with ORBAX, ocp.Checkpointer(new_handler()) as reader:
            args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(lambda _: how, item))
            found = dict(zip(kinds, jax.tree.leaves(reader.restore(path, args=args)), strict=True))
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
