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
    restored = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found.get("tree"))}
    paths = jax.tree_util.tree_leaves_with_path(like)
    leaves = [restored[_names(path)] if np.size(leaf) else leaf for path, leaf in paths]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def has_optional_fields(tree: Any) -> bool:
    """Return whether a named tuple in the tree has a field that is None."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_named_tuple)
    return any(field is None or has_optional_fields(field) for node in nodes if _is_named_tuple(node) for field in node)


def without_missing_fields(tree: Any, saved: Any) -> Any:
    """Return a tree in which a named tuple whose optional fields were not saved is a dict without them.

    Orbax restores a dict into a named tuple, but not where a field is None and the dict has no such key. Version 0.1
    saved such dicts for carries that are named tuples now.

    Args:
        tree: to restore into.
        saved: the tree of Orbax's metadata for it.
    """
    known = {_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved, is_leaf=lambda node: node is None)}
    return _without_missing_fields(tree, (), known)


def _without_missing_fields(tree: Any, above: tuple[str, ...], known: set[tuple[str, ...]]) -> Any:
    def convert(path: tuple[Any, ...], node: Any) -> Any:
        if not _is_named_tuple(node):
            return node
        here = above + _names(path)
        fields = {
            name: _without_missing_fields(field, (*here, name), known)
            for name, field in zip(node._fields, node, strict=True)
        }
        kept = {name: field for name, field in fields.items() if field is not None or (*here, name) in known}
        return type(node)(**fields) if kept.keys() == fields.keys() else kept

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=_is_named_tuple)


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path as strings, which are the same for a key of a dict and for a field."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
