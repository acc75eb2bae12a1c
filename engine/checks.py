"""Argument checks before the first step."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .messages import warn_user
from .trees import named_leaves

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash, because pathlib leaves only one
DONATED = "An earlier call, such as a run with donate=True, has donated it. Create it again, or do not donate it."
"""What to do about a deleted array."""


def check_int(who: str, name: str, value: Any, least: int) -> int:
    """Return the value of an argument if it is a whole number >= `least`.

    Args:
        who: the callback or function, for the error.
        name: the argument.
        value: what was given.
        least: the smallest allowed value.

    Raises:
        ValueError: it is not.

    >>> check_int("EarlyStopping", "patience", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: EarlyStopping needs patience to be a whole number >= 1, got 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{who} needs {name} to be a whole number >= {least}, got {value!r}.")
    return int(value)


def check_mode(who: str, mode: str, metric: str | None = None) -> str:
    """Return `mode` if it is `"min"` or `"max"`, and warn about `"min"` for a metric such as an accuracy.

    Args:
        who: the callback, for the error.
        mode: whether lower (`"min"`) or higher (`"max"`) values are better.
        metric: the name of the metric, such as `"val/accuracy"`.

    Raises:
        ValueError: it is neither.

    >>> check_mode("EarlyStopping", "least")
    Traceback (most recent call last):
    ...
    ValueError: EarlyStopping needs mode 'min' or 'max', got 'least'.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"{who} needs mode 'min' or 'max', got {mode!r}.")
    words = set(re.split(r"[^a-z0-9]+", (metric or "").lower()))
    if mode == "min" and words & HIGHER_IS_BETTER and not words & LOWER_IS_BETTER:
        warn_user(
            f"{who} treats lower values of {metric!r} as better (mode='min'). Pass mode='max' if higher is better."
        )
    return mode


HIGHER_IS_BETTER = {"acc", "accuracy", "auc", "auroc", "bleu", "f1", "iou", "precision", "psnr", "recall", "reward"}
LOWER_IS_BETTER = {"err", "error", "loss"}
"""Words in the names of metrics that suggest a mode. The second set wins, as in `accuracy_loss`."""


def check_list(who: str, name: str, value: Iterable[str] | None) -> None:
    """Check that a list of names is not a single string, which Python would iterate letter by letter.

    Raises:
        ValueError: it is.

    >>> check_list("Progress", "metrics", "train/loss")
    Traceback (most recent call last):
    ...
    ValueError: Progress needs metrics to be a list of names, got 'train/loss'. Pass metrics=['train/loss'].
    """
    if isinstance(value, str):
        raise ValueError(f"{who} needs {name} to be a list of names, got {value!r}. Pass {name}=[{value!r}].")


def local_path(who: str, path: str | os.PathLike[str]) -> str:
    """Return an absolute path in a local or mounted file system, with `~` expanded.

    Call it when your callback is made, so that a relative path keeps its meaning if the working directory changes.

    Args:
        who: the callback or function, for the error.
        path: a file or directory, which need not exist.

    Raises:
        ValueError: it is empty, or a URL.

    >>> local_path("Checkpoint", "~/run") == os.path.join(os.path.expanduser("~"), "run")
    True
    >>> local_path("Checkpoint", "gs://bucket/run")
    Traceback (most recent call last):
    ...
    ValueError: Checkpoint needs a path in a local or mounted file system, got 'gs://bucket/run'. ...
    """
    text = os.fsdecode(path)
    if not text:
        raise ValueError(f"{who} needs a path, got ''. Pass '.' for the current directory.")
    if _URL.match(text):
        raise ValueError(
            f"{who} needs a path in a local or mounted file system, got {text!r}. "
            "Mount the storage, or use a local path and copy the files afterwards."
        )
    return os.path.abspath(os.path.expanduser(text))


def local_file(who: str, path: str | os.PathLike[str]) -> str:
    """Return the path of a file, as `local_path` does.

    Raises:
        ValueError: it is empty, a URL, or an existing directory.

    >>> local_file("CSV", ".")
    Traceback (most recent call last):
    ...
    ValueError: CSV needs the path of a file, but ... is a directory.
    """
    text = local_path(who, path)
    if os.path.isdir(text):
        raise ValueError(f"{who} needs the path of a file, but {text} is a directory.")
    return text


def did_you_mean(name: str, among: Iterable[str]) -> str:
    """Return `" Did you mean ...?"` with the most similar name, or `""` if none is similar.

    >>> did_you_mean("val/los", ["val/loss", "train/loss"])
    ' Did you mean val/loss?'
    """
    found = difflib.get_close_matches(name, list(among), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def check_signature(method: Any, names: tuple[str, ...], who: str) -> None:
    """Check that a method can be called with these positional arguments.

    Raises:
        TypeError: it cannot; the message shows its signature.

    >>> check_signature(lambda loop: None, ("loop", "record"), "on_log")
    Traceback (most recent call last):
    ...
    TypeError: on_log needs the arguments (loop, record), got (loop).
    """
    if isinstance(method, (staticmethod, classmethod)) or not callable(method):
        raise TypeError(f"{who} needs to be a plain method, got {type(method).__name__}.")
    try:
        signature = inspect.signature(method)
    except ValueError:  # some builtins have no signature
        return
    try:
        signature.bind(*names)
    except TypeError:
        raise TypeError(f"{who} needs the arguments ({', '.join(names)}), got {signature}.") from None


def takes_rng(step: Callable[..., Any], who: str = "The step") -> bool:
    """Return whether a step has a third required argument, which is a random key.

    Raises:
        TypeError: it has another number of required arguments.

    >>> takes_rng(lambda state, batch, rng: None)
    True
    """
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # some builtins have no signature
        return False
    except TypeError:
        raise TypeError(f"{who} needs to be a function (state, batch), got {type(step).__name__}.") from None
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    names = [p.name for p in required]
    if any(p.kind is p.KEYWORD_ONLY for p in required) or not (len(names) in (2, 3) or (takes_any and len(names) < 2)):
        raise TypeError(f"{who} needs the arguments (state, batch) or (state, batch, rng), got ({', '.join(names)}).")
    return len(names) == 3


def check_rng(rng: Any, needed: bool) -> None:
    """Raise unless `rng` is a random key, or None if the step needs none."""
    if rng is None and needed:
        raise ValueError("The step takes a random key as its third argument. Pass one: rng=jax.random.key(0).")
    kind = getattr(rng, "dtype", None)
    if rng is not None and not (kind == jnp.uint32 or (kind and jnp.issubdtype(kind, jax.dtypes.prng_key))):
        raise TypeError(f"rng needs a random key such as jax.random.key(0), got {rng!r:.80}.")
    if isinstance(rng, jax.Array) and rng.is_deleted():
        raise ValueError(f"rng is a deleted array. {DONATED}")


def check_state(tree: Any, what: str) -> None:
    """Check that all leaves of a state are arrays that JAX can use, and numbers.

    Args:
        tree: a state or carries.
        what: its name, for the error.

    Raises:
        TypeError: a leaf is something else; the message says where it is and how to keep it out of the tree.
        ValueError: an array was donated and can no longer be read.

    >>> check_state({"x": 1.0, "label": "cat"}, "The state")
    Traceback (most recent call last):
    ...
    TypeError: The state needs arrays and numbers as leaves, got str at 'label'. Keep it out of the tree: ...
    """
    _check_leaves(tree, what, lambda path, leaf: _how_to_keep_out(tree, path))
    deleted = [isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree)]
    if any(deleted):
        raise ValueError(f"{what} holds a deleted array at {[*named_leaves(tree)][deleted.index(True)]!r}. {DONATED}")


def check_batch(batch: Any) -> None:
    """Raise a TypeError unless all leaves of a batch are arrays that JAX can use, and numbers.

    >>> check_batch({"x": 1.0, "label": "cat"})
    Traceback (most recent call last):
    ...
    TypeError: A batch needs arrays and numbers as leaves, got str at 'label'. Encode it as numbers, or leave it out.
    """

    def remedy(path: tuple[Any, ...], leaf: Any) -> str:
        where = "batch" + jax.tree_util.keystr(path).replace("'", '"')
        if hasattr(leaf, "numpy"):  # a tensor of PyTorch or TensorFlow
            return f"Convert it: {where}.numpy()."
        if hasattr(leaf, "__array__") and not isinstance(leaf, (np.ndarray, np.generic)):
            return f"Convert it: np.asarray({where})."
        return "Encode it as numbers, or leave it out."

    _check_leaves(batch, "A batch", remedy)


def _check_leaves(tree: Any, what: str, remedy: Callable[[tuple[Any, ...], Any], str]) -> None:
    if all(map(_usable, jax.tree.leaves(tree))):
        return
    for (path, leaf), name in zip(jax.tree_util.tree_leaves_with_path(tree), named_leaves(tree), strict=True):
        if not _usable(leaf):
            advice = remedy(path, leaf)
            raise TypeError(f"{what} needs arrays and numbers as leaves, got {_kind(leaf)} at {name!r}. {advice}")


def _usable(leaf: Any) -> bool:
    """Return whether a leaf is a number, or an array that JAX can use."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind in "biufc" or (leaf.dtype.kind == "V" and jnp.issubdtype(leaf.dtype, jnp.number))
    return isinstance(leaf, (jax.Array, int, float, complex)) or hasattr(leaf, "__jax_array__")


def _kind(leaf: Any) -> str:
    kind = type(leaf).__name__
    return f"{kind} of dtype {leaf.dtype}" if isinstance(leaf, (np.ndarray, np.generic)) else kind


def check_targets(epochs: Any, steps: Any, epoch_steps: Any) -> None:
    """Raise unless a run has a target, and all targets are whole numbers."""
    if epochs is None and steps is None:
        raise ValueError("A run needs a target: epochs=, steps= or both.")
    for name, value, least in (("epochs", epochs, 0), ("steps", steps, 0), ("epoch_steps", epoch_steps, 1)):
        if value is not None:
            check_int("A run", name, value, least)


def check_reachable(*, step: int, epoch: int, steps: int | None, epochs: int | None) -> None:
    """Raise if a saved run is already beyond its target."""
    for unit, at, target in (("step", step, steps), ("epoch", epoch, epochs)):
        if target is not None and at > target:
            plural = "" if target == 1 else "s"
            raise ValueError(f"The saved run is at {unit} {at}, beyond the target of {target} {unit}{plural}.")


def _how_to_keep_out(tree: Any, path: tuple[Any, ...]) -> str:
    """Return the line of code that keeps a leaf out of a state."""
    key: Any = path[-1] if path else None
    parent = _parent(tree, path)
    if isinstance(key, jax.tree_util.DictKey):
        name = key.key if str(key.key).isidentifier() else "value"
        return f"Keep it out of the tree: {name} = state{jax.tree_util.keystr(path[:-1])}.pop({key.key!r})."
    if any(base.__module__.startswith("equinox.") for base in type(parent).__mro__):
        return "Keep it out of the tree: params, static = eqx.partition(model, eqx.is_array)."
    if isinstance(key, jax.tree_util.GetAttrKey) and dataclasses.is_dataclass(parent):
        flax = hasattr(parent, "_flax_dataclass")
        field = "flax.struct.field(pytree_node=False)" if flax else "dataclasses.field(metadata={'static': True})"
        return f"Keep it out of the tree: declare {key.name} with {field}."
    return "Keep it out of the tree: a static field, a closure."


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the node that holds the leaf at a path."""
    for key in path[:-1]:
        nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node, root=tree: node is not root)[0]
        tree = next(node for start, node in nodes if start == (key,))
    return tree
