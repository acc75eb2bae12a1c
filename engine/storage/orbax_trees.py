"""Convert pytrees to the form that Orbax can store, and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


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


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return a path as strings, which are the same for a key of a dict and for a field."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
