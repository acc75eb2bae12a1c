"""Pytrees by name: paths of leaves, shapes and dtypes as text, fields of a state."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

State = Any
"""The state of a run: any pytree of arrays."""
Batch = Any
"""One batch: a pytree of arrays."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path; a tree that is one leaf has the name `"(the tree itself)"`.

    >>> named_leaves({"params": {"w": 1.0, "b": 2.0}})
    {'params/b': 2.0, 'params/w': 1.0}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "(the tree itself)": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def signature(tree: Any) -> dict[str, str]:
    """Return shapes and dtypes by path, as a compiled call sees them.

    >>> signature({"w": np.zeros((3, 4)), "step": 0})
    {'step': 'int32[]', 'w': 'float32[3,4]'}
    """
    return {name: _describe(leaf) for name, leaf in named_leaves(tree).items()}


def _describe(leaf: Any) -> str:
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", ())
    if dtype is None:
        dtype = jax.dtypes.result_type(leaf) if isinstance(leaf, (bool, int, float, complex)) else type(leaf).__name__
    elif isinstance(dtype, np.dtype) and dtype.kind in "biufc":
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return f"{dtype}[{','.join(map(str, shape))}]"


def compare_signatures(old: dict[str, str], new: dict[str, str], *, most: int = 4) -> str:
    """Return how two signatures differ, leaf by leaf with both sides; `""` if they are equal.

    >>> compare_signatures({"w": "float32[3]", "b": "float32[1]"}, {"w": "float32[4]"})
    'w: float32[3] became float32[4]; b: float32[1] is gone'
    """
    rows = [f"{name}: {kind} became {new[name]}" for name, kind in old.items() if new.get(name, kind) != kind]
    rows += [f"{name}: {kind} is gone" for name, kind in old.items() if name not in new]
    rows += [f"{name}: {kind} is new" for name, kind in new.items() if name not in old]
    return "; ".join(rows[:most] + ([f"and {len(rows) - most} more"] if len(rows) > most else []))


def ignore_sizes(new: dict[str, str], old: dict[str, str]) -> dict[str, str]:
    """Return the signature of a batch, with the entries of `old` for leaves that differ from it only in size.

    Such leaves have the same dtype and rank, and no more rows. The batch may be the last one of an epoch, or hold
    sequences of another length.
    """
    pattern = r"(.*)\[(\d+)(.*)"  # dtype, rows, other axes

    def same(name: str) -> bool:
        now, was = re.fullmatch(pattern, new[name]), re.fullmatch(pattern, old.get(name, ""))
        if now is None or was is None:
            return False
        return (now[1], now[3].count(",")) == (was[1], was[3].count(",")) and int(now[2]) <= int(was[2])

    return {name: old[name] if same(name) else kind for name, kind in new.items()}


def difference(old: Any, new: Any) -> str:
    """Return how two pytrees differ in paths, shapes, dtypes or structure; `""` if they do not.

    >>> difference({"w": np.zeros(3)}, {"w": np.zeros(4)})
    'w: float32[3] became float32[4]'
    """
    changed = compare_signatures(signature(old), signature(new))
    was, now = jax.tree.structure(old), jax.tree.structure(new)
    return changed or ("" if was == now else f"the structure {was} became {now}")


def strip_weak_types(tree: Any) -> Any:
    """Return the tree as arrays without weak types, so that a signature always hits the same executable."""

    def strip(leaf: Any) -> jax.Array:
        array = as_array(leaf)
        weak = getattr(array, "weak_type", False)  # random keys have no such attribute
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(strip, tree)


def same_objects(one: list[Any], other: list[Any]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def as_array(leaf: Any) -> jax.Array:
    """Return a leaf as a JAX array; a JAX array is returned unchanged."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def copy_numpy(batch: Batch) -> Batch:
    """Return the batch with its numpy arrays copied.

    JAX may read a numpy array in place, after its source has overwritten it.
    """
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def get_field(tree: Any, path: str, who: str) -> Any:
    """Return the part of a tree at a dotted path, through attributes or keys.

    Args:
        tree: usually `loop.state` or `ctx.state`.
        path: such as `"gen.params"`.
        who: the callback that needs it, for the error.

    Raises:
        ValueError: there is no such field; the message lists those that exist.

    >>> get_field({"gen": {"params": 1.0}}, "gen.params", "EMA")
    1.0
    """
    for name in path.split("."):
        found = _item(tree, name) if isinstance(tree, Mapping) else getattr(tree, name, None)
        found = _item(tree, name) if found is None else found
        if found is None:
            fields = [f.name for f in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else _keys(tree)
            raise ValueError(f"{who} needs {path!r} in the state, but {type(tree).__name__} has {fields}.")
        tree = found
    return tree


def set_field(tree: Any, path: str, value: Any) -> Any:
    """Return a copy of the tree with the part at a dotted path replaced.

    >>> set_field({"gen": {"params": 1.0}, "step": 0}, "gen.params", 2.0)
    {'gen': {'params': 2.0}, 'step': 0}
    """
    name, _, rest = path.partition(".")
    if rest:
        value = set_field(get_field(tree, name, "set_field"), rest, value)
    if hasattr(tree, "unfreeze"):  # Flax's FrozenDict
        return tree.copy({name: value})
    if hasattr(tree, "_replace"):  # a NamedTuple
        return tree._replace(**{name: value})
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{name: value})
    changed = jax.tree.map(lambda x: x, tree)  # copies the containers, for any type of mapping
    changed[name] = value
    return changed


def _item(tree: Any, name: str) -> Any:
    try:
        return tree[name]
    except (KeyError, TypeError, IndexError):
        return None


def _keys(tree: Any) -> list[str]:
    if hasattr(tree, "_fields"):
        return list(tree._fields)
    return [str(key) for key in tree] if hasattr(tree, "keys") else []
