"""Tools for authors of callbacks: fields of a state, checks of arguments and metrics, messages, record files.

The built-in callbacks use only public modules: `onstep`, this one, and `processes`, `redact`, `storage` and `plots`. So
your callbacks can do everything that they can do.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .checks import check_int, check_mode, check_signature, did_you_mean, takes_rng
from .compiled.cost import count_flops
from .evaluate import check_evaluation
from .event_files import close_event_writer, event_writer
from .loop import Loop
from .messages import log_user
from .placement import fold_in, to_host
from .record_files import RecordFile, exit_status, lines_to_keep, replace_file
from .records import Record
from .spans import Observer, Span
from .trees import difference, get_field, named_leaves, set_field, signature

__all__ = [
    "Observer",
    "RecordFile",
    "Span",
    "cast_like",
    "check_evaluation",
    "check_int",
    "check_mode",
    "check_package",
    "check_signature",
    "close_event_writer",
    "count_flops",
    "did_you_mean",
    "difference",
    "event_writer",
    "exit_status",
    "fold_in",
    "get_field",
    "get_fields",
    "has_training_metrics",
    "leaves_of_type",
    "lines_to_keep",
    "log_user",
    "map_floats",
    "named_leaves",
    "replace_file",
    "require_metric",
    "set_field",
    "set_fields",
    "signature",
    "takes_rng",
    "to_host",
    "warn_missing_metric",
    "widen",
]


def check_package(who: str, package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        ImportError: it is not; the message says how to install it.

    >>> check_package("WandB", "a_package_that_nobody_has")
    Traceback (most recent call last):
    ...
    ImportError: WandB needs a_package_that_nobody_has: pip install 'onstep[a_package_that_nobody_has]'.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{who} needs {package}: pip install 'onstep[{package}]'.")


def has_training_metrics(record: Record) -> bool:
    """Return whether a record holds the means of a training window (`train/...`).

    >>> has_training_metrics(Record(50, 0, {"train/loss": 0.3}))
    True
    """
    return any(name.startswith("train/") for name in record.values)


def warn_missing_metric(who: str, metric: str, loop: Loop) -> None:
    """Warn after the first epoch if a metric that a callback watches was not recorded; call it in `on_epoch_end`.

    There is no warning while the metric may still appear: before the first evaluation of the callback that its name
    begins with, and while its training window is open.

    Args:
        who: the callback, for the message.
        metric: the name in the records, such as `"val/loss"`.
        loop: the run.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state, {"loss": batch}))
    >>> engine.on("epoch_end")(lambda loop: warn_missing_metric("EarlyStopping", "val/los", loop))
    <function <lambda> at ...>
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = engine.run(0, [1, 2], epochs=1)
    >>> print(caught[0].message)
    EarlyStopping watches 'val/los', but the records hold ['epoch/loss']. Add Evaluate(...) or watch one of these.
    """
    first, _, rest = metric.partition("/")
    silent = first in loop.callbacks and not any(name.startswith(f"{first}/") for name in loop.latest)
    opened = first == "train" and f"epoch/{rest}" in loop.latest
    if loop.epoch == 1 and metric not in loop.latest and not (silent or opened):
        warnings.warn(_missing(who, metric, loop), stacklevel=3)


def require_metric(who: str, metric: str, loop: Loop) -> None:
    """Check that a metric appeared in a run that reached its target; call it in `on_run_end`.

    Args:
        who: the callback, for the message.
        metric: the name in the records, such as `"val/loss"`.
        loop: the run.

    Raises:
        ValueError: it never appeared; the message lists what did.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state, {"loss": batch}))
    >>> engine.on("run_end")(lambda loop: require_metric("EarlyStopping", "epoch/los", loop))
    <function <lambda> at ...>
    >>> engine.run(0, [1, 2], epochs=1)
    Traceback (most recent call last):
    ...
    ValueError: EarlyStopping watches 'epoch/los', but the records hold [...]. Did you mean epoch/loss?
    onstep: raised by <lambda>.on_run_end at step 2
    """
    reached = loop.step > loop.start_step and loop.finished and loop.stopped is None and loop.error is None
    if reached and metric not in loop.latest:
        raise ValueError(_missing(who, metric, loop))


def _missing(who: str, metric: str, loop: Loop) -> str:
    first = metric.partition("/")[0]
    siblings = [name for name in loop.latest if name.startswith(f"{first}/")]  # recorded by the same callback
    similar = did_you_mean(metric, siblings) or " Add Evaluate(...) or watch one of these."
    return f"{who} watches {metric!r}, but the records hold {sorted(loop.latest)}.{similar}"


def widen(leaf: jax.Array) -> jax.Array:
    """Return 16-bit and 8-bit floats as float32, and anything else unchanged.

    Averages kept in low precision lose small updates.

    >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf


def cast_like(tree: Any, like: Any) -> Any:
    """Return a tree with the dtypes of another one, such as averages in the dtypes of the parameters.

    It undoes `widen`. Leaves that have the right dtype are not copied.

    Args:
        tree: arrays.
        like: a tree of the same structure.

    >>> cast_like({"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
    dtype(bfloat16)
    """
    return jax.tree.map(lambda leaf, to: leaf if leaf.dtype == to.dtype else leaf.astype(to.dtype), tree, like)


def map_floats(function: Callable[[jax.Array, jax.Array], jax.Array], old: Any, new: Any) -> Any:
    """Return `function(old, new)` for every pair of float leaves, and the new leaf for any other.

    Use it for an average or a target that follows a tree with counters and random keys in it. The dtypes stay
    those of `old`, so an average can be kept in wider floats than the parameters.

    Args:
        function: a function of two arrays of `old`'s dtype.
        old: a tree of arrays.
        new: a tree of the same structure.

    >>> old, new = {"w": jnp.float32(1.0), "step": jnp.int32(4)}, {"w": jnp.bfloat16(2.0), "step": jnp.int32(5)}
    >>> map_floats(lambda a, b: (a + b) / 2, old, new)
    {'step': Array(5, dtype=int32), 'w': Array(1.5, dtype=float32)}
    """

    def follow(before: jax.Array, after: jax.Array) -> jax.Array:
        if not jnp.issubdtype(before.dtype, jnp.inexact):
            return after
        return function(before, after.astype(before.dtype)).astype(before.dtype)

    return jax.tree.map(follow, old, new)


def leaves_of_type(tree: Any, kind: Any) -> dict[str, Any]:
    """Return the leaves with a given kind of dtype, by name.

    Args:
        tree: arrays and numbers.
        kind: such as `jnp.floating`, or `jnp.inexact`, which includes complex numbers.

    >>> leaves_of_type({"params": {"w": 1.5, "scale": 2.0}, "step": 3}, jnp.floating)
    {'params/scale': 2.0, 'params/w': 1.5}
    """
    return {name: leaf for name, leaf in named_leaves(tree).items() if jnp.issubdtype(jnp.result_type(leaf), kind)}


def get_fields(tree: Any, of: str | tuple[str, ...] | None, who: str) -> Any:
    """Return the part of a state that a callback's argument `of` names.

    Args:
        tree: the state.
        of: a field, `"gen.params"` for a nested one; a tuple of them; or None for the whole state.
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
    return get_field(tree, of, who) if isinstance(of, str) else tuple(get_field(tree, path, who) for path in of)


def set_fields(tree: Any, of: str | tuple[str, ...] | None, value: Any) -> Any:
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
    for path, part in [(of, value)] if isinstance(of, str) else zip(of, value, strict=True):
        tree = set_field(tree, path, part)
    return tree
