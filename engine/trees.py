"""What a tree of arrays looks like, in words: the part every error about shapes shares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from .sharding import Spread

State = Any
"""Any pytree of arrays; the engine never opens it."""
Batch = Any
"""One batch: a pytree of arrays."""


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves by name: `{"params/w": array, ...}`; a bare array is `"(the tree itself)"`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "(the tree itself)": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def signature(tree: Any) -> dict[str, str]:
    """Shapes and dtypes by name, as the compiled call sees them: `{"params/w": "float32[3,4]"}`."""
    return {name: _describe(leaf) for name, leaf in leaves(tree).items()}


def _describe(leaf: Any) -> str:
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", ())
    if dtype is None:
        dtype = jax.dtypes.result_type(leaf) if isinstance(leaf, (bool, int, float, complex)) else type(leaf).__name__
    elif isinstance(dtype, np.dtype) and dtype.kind in "biufc":
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return f"{dtype}[{','.join(map(str, shape))}]"


def compare(old: dict[str, str], new: dict[str, str], *, most: int = 4) -> str:
    """How two signatures differ, `""` if they do not: the leaves, each with both sides."""
    rows = [f"{name}: {kind} became {new[name]}" for name, kind in old.items() if new.get(name, kind) != kind]
    rows += [f"{name}: {kind} is gone" for name, kind in old.items() if name not in new]
    rows += [f"{name}: {kind} is new" for name, kind in new.items() if name not in old]
    return "; ".join(rows[:most] + ([f"and {len(rows) - most} more"] if len(rows) > most else []))


def fewer_rows(new: dict[str, str], old: dict[str, str]) -> dict[str, str]:
    """A batch's signature, in which leaves of the dtype and rank of `old`, and with no more rows, read as there."""
    pattern = r"(.*)\[(\d+)(.*)"  # dtype, rows, other axes

    def same(name: str) -> bool:
        now, was = re.fullmatch(pattern, new[name]), re.fullmatch(pattern, old.get(name, ""))
        if now is None or was is None:
            return False
        return (now[1], now[3].count(",")) == (was[1], was[3].count(",")) and int(now[2]) <= int(was[2])

    return {name: old[name] if same(name) else kind for name, kind in new.items()}


def difference(old: Any, new: Any) -> str:
    """How two trees differ in names, shapes, dtypes or structure, `""` if they do not."""
    said = compare(signature(old), signature(new))
    was, now = jax.tree.structure(old), jax.tree.structure(new)
    return said or ("" if was == now else f"the structure {was} became {now}")


def strong(tree: Any) -> Any:
    """The tree with weak types made strong, so that one signature stays one executable."""

    def convert(leaf: Any) -> jax.Array:
        array = _array(leaf)
        weak = getattr(array, "weak_type", False)  # random keys have none
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(convert, tree)


def _array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def place(tree: Any, what: str, *, copy: bool = True, spread: Spread | None = None, like: Any = None) -> Any:
    """The tree as arrays that nobody else holds, committed to their device.

    Committed from the start, because restored arrays are: a resumed run then reuses the
    executable. With `copy=False` only what must be converted, or occurs twice, is copied.

    Args:
        tree: arrays and numbers.
        what: it is, for errors.
        copy: whether everything is copied.
        spread: of many devices, on which the tree shall lie.
        like: a tree that lies as this one shall there; without, what is on one device gets whole to all.

    Raises:
        TypeError: a leaf is no array or number; the message names it and `what` it belongs to.
        ValueError: a leaf lies on other devices than those.
    """
    for name, leaf in leaves(tree).items():
        if not isinstance(leaf, (jax.Array, int, float, complex)) and getattr(leaf, "dtype", None) is None:
            raise TypeError(
                f"{what} needs arrays and numbers as leaves, got {type(leaf).__name__} at {name!r}. "
                "Keep it out of the tree (a static field, a closure)."
            )
    flat, structure = jax.tree.flatten(tree)
    there = home(tree)
    wanted = [None] * len(flat) if like is None else [leaf.sharding for leaf in jax.tree.leaves(like)]
    seen: set[int] = set()
    out = []
    for leaf, layout in zip(flat, wanted, strict=True):
        owned = not copy and isinstance(leaf, jax.Array) and id(leaf) not in seen
        seen.add(id(leaf))
        array = strong(leaf if owned else jnp.copy(_array(leaf)))
        if spread is not None:
            out.append(spread.settle(array, layout))
        else:
            out.append(array if array.committed or there is None else jax.device_put(array, there))
    return jax.tree.unflatten(structure, out)


def home(tree: Any) -> jax.sharding.Sharding | None:
    """The one device that a tree is committed to, the default one if to none, None for several."""
    committed = {x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.committed}
    if any(len(sharding.device_set) > 1 for sharding in committed):
        return None
    return next(iter(committed), jnp.zeros(()).sharding)


def copied(batch: Batch) -> Batch:
    """The batch with its numpy arrays copied: jax may read them where they lie, and their source fill them again."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def local_bytes(tree: Any) -> dict[str, bytes]:
    """By name, the bytes of the leaves that every device has whole."""

    def plain(leaf: jax.Array) -> jax.Array:
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    whole = {name: plain(leaf) for name, leaf in leaves(tree).items() if leaf.is_fully_replicated}
    return {name: np.asarray(leaf.addressable_data(0)).tobytes() for name, leaf in whole.items()}


def get_field(tree: Any, path: str, who: str) -> Any:
    """The part of a tree at a dotted path: `"gen.params"`, through attributes or keys."""
    for name in path.split("."):
        found = _item(tree, name) if isinstance(tree, Mapping) else getattr(tree, name, None)
        found = _item(tree, name) if found is None else found
        if found is None:
            have = [f.name for f in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else _keys(tree)
            raise ValueError(f"{who} needs {path!r} in the state, but {type(tree).__name__} has {have}.")
        tree = found
    return tree


def set_field(tree: Any, path: str, value: Any) -> Any:
    """A copy of the tree with the part at a dotted path replaced."""
    name, _, rest = path.partition(".")
    if rest:
        value = set_field(get_field(tree, name, "set_field"), rest, value)
    if hasattr(tree, "unfreeze"):  # Flax's FrozenDict
        return tree.copy({name: value})
    if hasattr(tree, "_replace"):  # a NamedTuple
        return tree._replace(**{name: value})
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{name: value})
    changed = jax.tree.map(lambda x: x, tree)  # a copy of the containers, whatever mapping it is
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
