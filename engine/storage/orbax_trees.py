"""Pytrees in the form that Orbax can store, and back."""

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
    restored = dict(_leaves(found["tree"]))
    leaves = [restored[name] if np.size(leaf) else leaf for name, leaf in _leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def without_optional_fields(tree: Any) -> Any:
    """Return a tree in which a named tuple with fields that are None is a dict without these fields.

    Orbax restores a dict into a named tuple, but not where a field is None and the dict has no such key. Version 0.1
    saved such dicts for carries that are named tuples now.
    """

    def convert(node: Any) -> Any:
        if not _is_named_tuple(node):
            return node
        fields = {name: without_optional_fields(field) for name, field in zip(node._fields, node, strict=True)}
        if any(field is None for field in node):
            return {name: field for name, field in fields.items() if field is not None}
        return type(node)(**fields)

    return jax.tree.map(convert, tree, is_leaf=_is_named_tuple)


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves, each with its path as strings: the same for a key of a dict and for a field."""
    return [
        (tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
