"""Pytrees by name: paths of leaves, shapes and dtypes as text."""

from __future__ import annotations

import operator
import re
import sys
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


def ignore_sizes(new: dict[str, str], old: dict[str, str], *, rows_only: bool = False) -> dict[str, str]:
    """Return the signature of a batch, with the entries of `old` for leaves that differ from it only in size.

    Such leaves have the same dtype and rank, and no more rows. The batch may be the last one of an epoch, or, unless
    `rows_only` is set, hold sequences of another length.
    """
    pattern = r"(.*)\[(\d+)(.*)"  # dtype, rows, other axes

    def same(name: str) -> bool:
        now, was = re.fullmatch(pattern, new[name]), re.fullmatch(pattern, old.get(name, ""))
        if now is None or was is None:
            return False
        axes = [now[3], was[3]] if rows_only else [now[3].count(","), was[3].count(",")]
        return now[1] == was[1] and axes[0] == axes[1] and int(now[2]) <= int(was[2])

    return {name: old[name] if same(name) else kind for name, kind in new.items()}


def difference(old: Any, new: Any) -> str:
    """Return how two pytrees differ in paths, shapes, dtypes or structure; `""` if they do not.

    >>> difference({"w": np.zeros(3)}, {"w": np.zeros(4)})
    'w: float32[3] became float32[4]'
    """
    changed = compare_signatures(signature(old), signature(new))
    was, now = jax.tree.structure(old), jax.tree.structure(new)
    return changed or ("" if was == now else f"the structure {was} became {now}")


def dtype_advice(old: Any, new: Any) -> str:
    """Return what to do about the first leaf that changed only its dtype; `""` if there is none.

    >>> dtype_advice({"n": np.int32(0)}, {"n": np.float32(0.5)})
    ' Start n as a float, such as 1.0.'
    """
    before, after = named_leaves(old), named_leaves(new)
    for name, leaf in before.items():
        if name not in after or np.shape(leaf) != np.shape(after[name]) or _describe(leaf) == _describe(after[name]):
            continue
        it = "it" if leaf is old else name
        was, now = jnp.result_type(leaf), jnp.result_type(after[name])
        if not jnp.issubdtype(was, jnp.inexact) and jnp.issubdtype(now, jnp.floating):
            return f" Start {it} as a float, such as 1.0."
        return f" Return {it} as {was}: .astype(jnp.{was}). Or start it as {now}."
    return ""


def weak_leaves(tree: Any) -> dict[str, str]:
    """Return the dtypes, by name, that JAX gives to the Python numbers and weakly typed arrays of a tree.

    >>> weak_leaves({"w": np.zeros(3), "rate": 0.5})
    {'rate': 'float32'}
    """

    def weak(leaf: Any) -> bool:
        return getattr(leaf, "weak_type", False) or type(leaf) in (int, float, complex)

    return {name: str(jnp.result_type(leaf)) for name, leaf in named_leaves(tree).items() if weak(leaf)}


def strip_weak_types(tree: Any) -> Any:
    """Return the tree as arrays without weak types, so that a signature always hits the same executable."""

    def strip(leaf: Any) -> jax.Array:
        array = as_array(leaf)
        weak = getattr(array, "weak_type", False)  # random keys have no such attribute
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(strip, tree)


def as_array(leaf: Any) -> jax.Array:
    """Return a leaf as a JAX array; a JAX array is returned unchanged."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def copy_containers(tree: Any) -> Any:
    """Return the tree with the same leaves in new containers.

    User code may change a dict, a list or an NNX module in place. With a copy, nothing else sees the change.

    >>> tree = {"w": 1.0}
    >>> copy_containers(tree).update(w=2.0)
    >>> tree
    {'w': 1.0}
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, leaves)


def same_leaves(one: Any, other: Any) -> bool:
    """Return whether two trees hold the same objects as leaves, at the same places.

    >>> leaf = np.zeros(2)
    >>> same_leaves({"a": leaf}, {"a": leaf}), same_leaves([leaf], (leaf,)), same_leaves([leaf], [np.zeros(2)])
    (True, False, False)
    """
    a, b = (jax.tree.flatten(tree) for tree in (one, other))
    return a[1] == b[1] and all(map(operator.is_, a[0], b[0]))


def read_only(tree: Any) -> Any:
    """Return the tree in new containers, with views of its numpy arrays that cannot be written to.

    >>> array = np.zeros(2)
    >>> read_only({"x": array})["x"][0] = 1
    Traceback (most recent call last):
    ...
    ValueError: assignment destination is read-only
    """

    def view(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        leaf = leaf.view()
        leaf.flags.writeable = False
        return leaf

    return jax.tree.map(view, tree)


def check_not_shared(tree: Any, what: str) -> None:
    """Raise a ValueError if a tree holds one NNX variable twice, as a model with tied weights does.

    As a pytree, it would be two variables from the first step on.
    """
    nnx: Any = sys.modules.get("flax.nnx")  # if it is not imported, the tree holds no variable
    if nnx is None:
        return
    variables = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    seen: dict[int, str] = {}
    for path, node in variables:
        if isinstance(node, nnx.Variable):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if (first := seen.setdefault(id(node), name)) != name:
                raise ValueError(
                    f"{what} holds one NNX {type(node).__name__} at {first!r} and {name!r}, which would be trained as "
                    "two. Make the arrays the state: graph, state = nnx.split(model), and "
                    "model = nnx.merge(graph, state) in the step."
                )


def copy_numpy(batch: Batch) -> Batch:
    """Return the batch with its numpy arrays copied.

    JAX may read a numpy array in place, after its source has overwritten it.
    """
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)
