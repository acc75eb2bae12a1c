"""Argument checks before the first step."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .messages import warn_user
from .trees import named_leaves

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash, because pathlib leaves only one
DONATED = (
    "It was donated to a compiled call: by a run with donate=True, or, if it is of loop.state, by the next step. "
    "Create it again, or keep a copy: jax.tree.map(jnp.copy, loop.state)."
)
"""What to do about a deleted array."""


def check_call(
    function: Callable[..., Any],
    who: str,
    given: tuple[Any, ...],
    named: Iterable[str],
    others: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """Check that a call has no unknown argument, and none by position that needs its name.

    Python's own errors do not say which name that is.

    Args:
        function: what is called; its first parameter is `self`.
        who: its name, for the error.
        given: the arguments by position, without `self`.
        named: the names of the others.
        others: functions by name, one of which may have been meant.

    Raises:
        TypeError: the call has such an argument; the message says how to write it.

    >>> def run(self, state, data=None, *, epochs=None): pass
    >>> check_call(run, "engine.run", (0, [1], 5), ())
    Traceback (most recent call last):
    ...
    TypeError: engine.run takes (state, data) by position, and got 3. Pass the others by name: epochs=5.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [*by_position, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(given) > len(by_position):
        if known == by_position:
            raise TypeError(f"{who} takes the arguments ({', '.join(known)}), and got {len(given)}.")
        name = next((name for name in known[len(by_position) :] if name not in set(named)), known[-1])
        takes = f"({', '.join(by_position)})" if by_position else "no arguments"
        raise TypeError(
            f"{who} takes {takes} by position, and got {len(given)}. Pass the others by name: "
            f"{name}={given[len(by_position)]!r:.60}."
        )
    unknown = [name for name in named if name not in known]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        name = unknown[0]
        where = next((other for other, it in others.items() if name in inspect.signature(it).parameters), None)
        advice = did_you_mean(name, known) or f" Its arguments are {', '.join(known)}."
        raise TypeError(f"{who} has no argument {name!r}." + (f" It is an argument of {where}." if where else advice))


class CheckedCall:
    """A class whose call explains an unknown argument, or one by position that needs its name."""

    # In a base class, because `inspect.signature` shows whichever of `__new__` and `__init__` comes first. Type
    # checkers see only `__init__`.
    if not TYPE_CHECKING:

        def __new__(cls, *_given: Any, **_named: Any) -> Any:
            """Check the arguments, before `__init__` gets them."""
            cls._check_call(_given, _named)
            make = super().__new__
            return make(cls) if make is object.__new__ else make(cls, *_given, **_named)

    @classmethod
    def _check_call(cls, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if cls.__init__ is not object.__init__:
            check_call(cls.__init__, cls.__name__, given, named)
        elif given or named:
            raise TypeError(f"{cls.__name__} takes no arguments.")


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


HIGHER_IS_BETTER = {
    *("acc", "acc1", "acc5", "accuracy", "auc", "auroc", "bleu", "dice", "f1", "iou", "mrr", "ndcg", "precision"),
    *("psnr", "recall", "reward", "rouge", "ssim", "top1", "top5"),
}
LOWER_IS_BETTER = {"distance", "err", "error", "fid", "loss", "lpips", "mae", "mse", "nll", "perplexity", "rmse", "wer"}
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
        TypeError: it is not a path.
        ValueError: it is empty, or a URL.

    >>> local_path("Checkpoint", "~/run") == os.path.join(os.path.expanduser("~"), "run")
    True
    >>> local_path("Checkpoint", "gs://bucket/run")
    Traceback (most recent call last):
    ...
    ValueError: Checkpoint needs a path in a local or mounted file system, got 'gs://bucket/run'. ...
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{who} needs a path, such as 'runs/first', got {path!r:.80}.")
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

    A name that ends with `/<name>` is preferred.

    >>> did_you_mean("val/los", ["val/loss", "train/loss"])
    ' Did you mean val/loss?'
    >>> did_you_mean("lr", ["epoch/loss", "train/lr"])
    ' Did you mean train/lr?'
    """
    among = [each for each in among if isinstance(each, str)]
    ends = sorted(each for each in among if each.endswith(f"/{name}"))
    found = ends[-1:] or difflib.get_close_matches(str(name), among, n=1)
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
        TypeError: it has another number of required arguments, or its body would not run when it is called.

    >>> takes_rng(lambda state, batch, rng: None)
    True
    """
    if isinstance(step, type):
        raise TypeError(f"{who} needs to be a function (state, batch), got the class {step.__name__}.")
    check_plain(step, who)
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # some builtins have no signature
        return False
    except TypeError:
        raise TypeError(f"{who} needs to be a function (state, batch), got {type(step).__name__}.") from None
    required = _required(parameters)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    names = [p.name for p in required]
    if any(p.kind is p.KEYWORD_ONLY for p in required) or not (len(names) in (2, 3) or (takes_any and len(names) < 2)):
        raise TypeError(f"{who} needs the arguments (state, batch) or (state, batch, rng), got ({', '.join(names)}).")
    if names[:1] == ["self"]:
        raise TypeError(f"{who} is a method of a class, got ({', '.join(names)}). Pass the method of an object.")
    return len(names) == 3


def _required(parameters: Iterable[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def check_plain(function: Any, who: str) -> None:
    """Raise a TypeError for a coroutine or generator function, whose body would not run when it is called."""
    for kind, is_kind in (("a coroutine", inspect.iscoroutinefunction), ("a generator", inspect.isgeneratorfunction)):
        if is_kind(function):
            raise TypeError(f"{who} needs to be a plain function, got {kind} function, whose body would never run.")


def check_rng(rng: Any, step: Callable[..., Any] | None) -> None:
    """Raise unless `rng` is a random key, or None if no step needs one; `step` is the one that takes it, or None."""
    if rng is None and step is not None:
        raise ValueError(f"The step takes a random key as its third argument{_third(step)}")
    kind = getattr(rng, "dtype", None)
    if rng is not None and not (kind == jnp.uint32 or (kind and jnp.issubdtype(kind, jax.dtypes.prng_key))):
        raise TypeError(f"rng needs a random key such as jax.random.key(0), got {rng!r:.80}.")
    if isinstance(rng, jax.Array) and rng.is_deleted():
        raise ValueError(f"rng is a deleted array. {DONATED}")


def _third(step: Callable[..., Any]) -> str:
    """Return the end of the error that a step gets no random key: what to do."""
    names = [parameter.name for parameter in _required(inspect.signature(step).parameters.values())]
    if re.search("rng|key|seed|random", names[2].lower()):
        return ". Pass one: rng=jax.random.key(0)."
    return (
        f", here {names[2]!r}. If it needs one, pass rng=jax.random.key(0). Otherwise give the step two arguments, "
        f"({', '.join(names)}) -> (state, batch), with everything that changes in the state, a dict for example."
    )


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


def check_batch(batch: Any, what: str = "A batch") -> None:
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

    _check_leaves(batch, what, remedy)


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


def check_order(state: Any, data: Any) -> None:
    """Raise a TypeError if the state and the data of a run are swapped."""

    def is_state(tree: Any) -> bool:
        leaves = jax.tree.leaves(tree)
        return bool(leaves) and not isinstance(tree, (list, tuple)) and all(map(_usable, leaves))

    leaf = jax.tree_util.all_leaves([state]) and not _usable(state)
    if (leaf and (hasattr(state, "__iter__") or callable(state)) and is_state(data)) or (
        isinstance(state, list) and is_state(data) and not hasattr(data, "__iter__")
    ):
        kinds = f"{type(state).__name__} and {type(data).__name__}"
        raise TypeError(f"A run takes the state first, then the data, got {kinds}. Swap them: engine.run(state, data).")


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
            raise ValueError(
                f"The saved run is at {unit} {at}, beyond the target of {target} {unit}{plural}. Targets count from "
                f"the beginning of the first run: pass {unit}s={at + target} for {target} more."
            )


def _how_to_keep_out(tree: Any, path: tuple[Any, ...]) -> str:
    """Return the line of code that keeps a leaf out of a state."""
    key: Any = path[-1] if path else None
    parent, leaf = _parent(tree, path), _at(tree, path)
    if _comes_from(leaf, "flax.linen"):
        return 'A Linen model holds no arrays. The state is what it is initialized to: model.init(key, x)["params"].'
    if type(parent).__name__.startswith("GradientTransformation"):
        return "An Optax optimizer is functions. Put its state into the state: tx.init(params)."
    if not path and callable(leaf):
        return "The state is what the step changes, such as the parameters: a dict, a TrainState or an NNX module."
    if isinstance(key, jax.tree_util.DictKey):
        name = key.key if str(key.key).isidentifier() else "value"
        return f"Keep it out of the tree: {name} = state{jax.tree_util.keystr(path[:-1])}.pop({key.key!r})."
    if _comes_from(parent, "equinox"):
        return "Keep it out of the tree: params, static = eqx.partition(model, eqx.is_array)."
    if isinstance(key, jax.tree_util.GetAttrKey) and dataclasses.is_dataclass(parent):
        flax = hasattr(parent, "_flax_dataclass")
        field = "flax.struct.field(pytree_node=False)" if flax else "dataclasses.field(metadata={'static': True})"
        return f"Keep it out of the tree: declare {key.name} with {field}."
    return "Keep it out of the tree: a static field, a closure."


def _comes_from(node: Any, package: str) -> bool:
    """Return whether a node's class, or a base of it, is defined in a package that need not be installed."""
    return any(base.__module__.startswith(f"{package}.") for base in type(node).__mro__)


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the node that holds the leaf at a path."""
    return _at(tree, path[:-1])


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the node or leaf at a path."""
    for key in path:
        nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node, root=tree: node is not root)[0]
        tree = next(node for start, node in nodes if start == (key,))
    return tree
