"""Fields of a state by name: attributes, keys and indices, joined by dots."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import jax

from .checks import did_you_mean
from .trees import signature

Field = str | int
"""One field of a state: `"params"`, `"gen.params"` or `"0.params"` for a nested one, or an index."""
Fields = Field | tuple[Field, ...] | None
"""What a callback's argument `of` may be: a field, a tuple of fields, or None for the whole state."""

SHOWN = 20
"""Names that an error lists."""


def get_field(tree: Any, path: Field, who: str) -> Any:
    """Return the part of a tree at a dotted path of attributes, keys and indices.

    Args:
        tree: usually `loop.state` or `ctx.state`.
        path: such as `"gen.params"`; `"0.params"` or `0` in a tuple, a list, or the NNX state of several modules.
        who: the callback that needs it, for the error.

    Raises:
        ValueError: there is no such field; the message lists those that exist.

    >>> get_field({"gen": {"params": 1.0}}, "gen.params", "EMA")
    1.0
    >>> get_field(({"params": 1.0}, 2.0), "0.params", "EMA")
    1.0
    >>> get_field({"params": 1.0}, "parms", "EMA")
    Traceback (most recent call last):
    ...
    ValueError: EMA needs 'parms' in the state, but dict has ['params']. Did you mean params?
    """
    node, rest = tree, str(path)
    while True:
        found = _next(node, rest)
        if found is None:
            raise ValueError(_unknown(tree, path, node, rest, who))
        _, node, rest = found
        if not rest:
            return node


def set_field(tree: Any, path: Field, value: Any) -> Any:
    """Return a copy of the tree with the part at a dotted path replaced.

    Args:
        tree: as for `get_field`; it is not changed.
        path: as for `get_field`.
        value: the new part.

    Raises:
        ValueError: there is no such field, or it is a property, which cannot be replaced.

    >>> set_field({"gen": {"params": 1.0}, "step": 0}, "gen.params", 2.0)
    {'gen': {'params': 2.0}, 'step': 0}
    >>> set_field((1.0, 2.0), 1, 3.0)
    (1.0, 3.0)
    """
    get_field(tree, path, "set_field")  # for its error
    return _replace(tree, str(path), value)


def get_fields(tree: Any, of: Fields, who: str) -> Any:
    """Return the part of a state that a callback's argument `of` names.

    Args:
        tree: the state.
        of: a field, `"gen.params"` or `"0.params"` for a nested one; an index; a tuple of fields; or None for the
            whole state.
        who: the callback, for the error.

    Returns:
        The field; for a tuple of names, a tuple of fields.

    Raises:
        ValueError: the state has no such field; the message lists the fields that it has.

    >>> get_fields({"gen": {"params": 1}, "disc": 2}, ("gen.params", "disc"), "EMA")
    (1, 2)
    """
    if of is None:
        return tree
    if jax.tree_util.all_leaves([tree]):
        raise ValueError(
            f"{who} needs {of!r} in the state, but the state is one array, {_kind(tree)}. Pass of=None, "
            "which means the whole state."
        )
    return get_field(tree, of, who) if isinstance(of, Field) else tuple(get_field(tree, path, who) for path in of)


def set_fields(tree: Any, of: Fields, value: Any) -> Any:
    """Return a copy of a state in which the part that `of` names is replaced.

    Args:
        tree: the state, which is not changed.
        of: as for `get_fields`.
        value: the new part, with the structure that `get_fields` returns.

    >>> set_fields({"gen": {"params": 1}, "disc": 2}, ("gen.params", "disc"), (3, 4))
    {'disc': 4, 'gen': {'params': 3}}
    """
    if of is None:
        return value
    for path, part in [(of, value)] if isinstance(of, Field) else zip(of, value, strict=True):
        tree = set_field(tree, path, part)
    return tree


def _children(tree: Any) -> list[tuple[str, Any, Any]]:
    """Return the name, key and value of every child of a node; nothing for a leaf."""
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
    return [(jax.tree_util.keystr(path, simple=True), path[0], child) for path, child in paths if path]


def _next(tree: Any, path: str) -> tuple[Any, Any, str] | None:
    """Return the key and the value of the child that a path begins with, and the rest of the path; None if none."""
    children = _children(tree)
    # The longest name, because a key may have dots: {"layers.0.weight": ...}.
    fits = [child for child in children if f"{path}.".startswith(f"{child[0]}.")]
    if fits:
        name, key, child = max(fits, key=lambda fit: len(fit[0]))
        # Not `child`, because FrozenDict returns nested dicts in a different form from how it stores them.
        return key, tree[key.key] if isinstance(key, jax.tree_util.DictKey) else child, path[len(name) + 1 :]
    name, _, rest = path.partition(".")
    value = getattr(tree, name, None) if children and not isinstance(tree, (Mapping, tuple, list)) else None
    if value is None or callable(value):
        return None
    # An attribute of a class that JAX knows without names, or a property, which has no key.
    return next((key for _, key, child in children if child is value), None), value, rest


def _replace(tree: Any, path: str, value: Any) -> Any:
    key, child, rest = _next(tree, path) or (None, None, "")
    if rest:
        value = _replace(child, rest, value)
    if key is None:
        raise ValueError(f"{path!r} cannot be replaced, because it is a property of {type(tree).__name__}.")
    if isinstance(key, jax.tree_util.DictKey) and hasattr(tree, "unfreeze"):  # Flax's FrozenDict
        return tree.copy({key.key: value})
    if isinstance(key, jax.tree_util.DictKey) and isinstance(tree, MutableMapping):
        changed: Any = jax.tree.map(lambda x: x, tree)  # copies the containers, for any type of mapping
        changed[key.key] = value
        return changed
    structure = jax.tree.structure(tree, is_leaf=lambda node: node is not tree)
    return jax.tree.unflatten(structure, [value if k == key else part for _, k, part in _children(tree)])


def _unknown(tree: Any, path: Field, node: Any, rest: str, who: str) -> str:
    """Return the error for a path of which `rest` is not in `node`."""
    names = [name for name, _, _ in _children(node) if not name.startswith("_")]
    if names:
        found = f"{type(node).__name__} has {names if len(names) <= SHOWN else [*names[:SHOWN], '...']}"
    else:
        where = "the state" if node is tree else repr(str(path).removesuffix(rest).rstrip("."))
        found = f"{where} is one array, {_kind(node)}" if jax.tree_util.all_leaves([node]) else f"{where} is empty"
    known = dict.fromkeys(name for leaf in _paths(tree) for name in leaf)
    nested = next((name for name in known if name.endswith(f".{path}")), None)
    similar = f" Did you mean {nested}?" if nested else did_you_mean(str(path), known)
    return f"{who} needs {path!r} in the state, but {found}.{similar}"


def _paths(tree: Any) -> list[list[str]]:
    """Return for each leaf the fields that it is in, from the outermost one to itself."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        [jax.tree_util.keystr(path[: n + 1], simple=True, separator=".") for n in range(len(path))] for path in paths
    ]


def _kind(leaf: Any) -> str:
    return next(iter(signature(leaf).values()))
