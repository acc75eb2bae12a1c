"""Tools for authors of callbacks: fields of a state, checks of arguments and metrics, messages, record files.

The built-in callbacks use only public modules: `onstep`, this one, and `processes`, `redact`, `storage` and `plots`. So
your callbacks can do everything that they can do.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .activity import Activity, thread_activity
from .callback import Callback, Carry
from .checks import (
    check_int,
    check_list,
    check_mode,
    check_signature,
    did_you_mean,
    local_file,
    local_path,
    takes_rng,
)
from .compiled.cost import count_flops
from .data.source import check_data
from .evaluate import check_evaluation
from .event_files import close_event_writer, event_writer
from .fields import get_field, get_fields, set_field, set_fields
from .loop import Loop
from .messages import log_user, print_text, warn_user
from .placement import fold_in, to_host
from .record_files import RecordFile, exit_status, lines_to_keep, replace_file
from .records import Record
from .replay import replay_command
from .result import Result
from .spans import Observer, Span
from .trees import difference, named_leaves, signature

__all__ = [
    "Activity",
    "Observer",
    "RecordFile",
    "Span",
    "cast_like",
    "check_data",
    "check_evaluation",
    "check_int",
    "check_list",
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
    "get_carry",
    "get_field",
    "get_fields",
    "has_training_metrics",
    "leaves_of_type",
    "lines_to_keep",
    "local_file",
    "local_path",
    "log_user",
    "map_floats",
    "named_leaves",
    "print_text",
    "replace_file",
    "replay_command",
    "set_field",
    "set_fields",
    "signature",
    "takes_rng",
    "thread_activity",
    "to_host",
    "warn_missing_metric",
    "warn_user",
    "widen",
]


def check_package(who: str, package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        ImportError: it is not; the message says how to install it.

    >>> check_package("WandB", "a_package_that_nobody_has")
    Traceback (most recent call last):
    ...
    ImportError: WandB needs the package a_package_that_nobody_has, which is not installed: pip install ...
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{who} needs the package {package}, which is not installed: pip install {package}")


def has_training_metrics(record: Record) -> bool:
    """Return whether a record holds the means of a training window (`train/...`).

    >>> has_training_metrics(Record(50, 0, {"train/loss": 0.3}))
    True
    """
    return any(name.startswith("train/") for name in record.values)


def warn_missing_metric(who: str, metric: str, loop: Loop, record: Record | None = None) -> None:
    """Warn if a metric that a callback watches is not recorded.

    Call it in `on_epoch_begin`, in `on_log` with the record, in `on_epoch_end` unless `loop.over`, and in `on_run_end`.
    It warns once, as soon as the name is certainly wrong: before the first step, if a callback has announced other
    names with the same prefix; after the first evaluation that did not record it; or at the end of the first epoch,
    unless the metric may still come from an evaluation that was not due. A prefix that no callback uses, as in
    `vall/loss`, may belong to a callback that has not logged yet, so it is told at the end of the first epoch. It warns
    again at the end of a run that reached its target.

    Args:
        who: the callback, for the message.
        metric: the name in the records, such as `"val/loss"`.
        loop: the run.
        record: in `on_log`, the record.

    >>> import warnings
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state, {"loss": batch}), log_every=2)
    >>> engine.on("log")(lambda loop, record: warn_missing_metric("EarlyStopping", "train/los", loop, record))
    <function <lambda> at ...>
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = engine.run(0, [1, 2, 3, 4], epochs=1)
    >>> print(caught[0].message)
    EarlyStopping watches 'train/los', but the records hold ['train/loss']. Did you mean train/loss?
    """
    known = sorted({*loop.latest, *loop.announced})
    if metric in known:
        return
    first, _, rest = metric.partition("/")
    siblings = [name for name in known if name.startswith(f"{first}/")]  # recorded by the same callback
    if loop.step == loop.start_step and record is None:
        missing = bool(siblings) and not loop.over
    elif record is not None:  # the second such record, because another callback may log at the step of the first
        missing = any(len(loop.history[name]) == 2 for name in siblings if name in record.values)
    elif loop.over:
        missing = loop.finished and loop.stopped is None and loop.error is None and loop.step > loop.start_step
    elif siblings:
        missing = any(loop.history.steps(name) == [loop.step] for name in siblings if name in loop.history)
    else:
        opened = first == "train" and f"epoch/{rest}" in loop.latest  # its window is longer than an epoch
        missing = loop.epoch == 1 and first not in loop.callbacks and not opened
    told = _told.setdefault(loop, set())
    if missing and ((loop.over and record is None) or (who, metric) not in told):
        told.add((who, metric))
        similar = did_you_mean(metric, siblings or known) or " Add Evaluate(...) or watch one of these."
        warn_user(f"{who} watches {metric!r}, but the records hold {known}.{similar}")


def get_carry(source: Loop | Result, callback: Callback) -> Carry:
    """Return the carry of a callback in a run or in its result; the arrays of a run are donated to its next step.

    Args:
        source: the loop or the result, as the user passed it to a method such as `ema.params(result)`.
        callback: one of the run's, with a compiled half.

    Raises:
        TypeError: `source` is something else, such as a state.
        ValueError: the callback is not one of the run's, or has no compiled half.

    >>> get_carry({"params": 1.0}, Callback())
    Traceback (most recent call last):
    ...
    TypeError: Callback needs the loop or the result of a run, got dict.
    """
    if not isinstance(source, (Loop, Result)):
        who = callback.name or type(callback).__name__
        raise TypeError(f"{who} needs the loop or the result of a run, got {type(source).__name__}.")
    return source.carry(callback)


_told: weakref.WeakKeyDictionary[Loop, set[tuple[str, str]]] = weakref.WeakKeyDictionary()
"""The callbacks and metrics about which a run has warned."""


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
