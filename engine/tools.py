"""Tools for authors of callbacks: fields of a state, checks of arguments and metrics, messages, record files.

The built-in callbacks use nothing else of the engine's inside, so whatever they can do, yours can do as well.
"""

from __future__ import annotations

import importlib.util
import warnings

import jax
import jax.numpy as jnp

from .checks import check_int, check_signature, did_you_mean, takes_rng
from .compiled.cost import count_flops
from .event_files import close_event_writer, event_writer
from .loop import Loop
from .messages import log_user
from .placement import to_host
from .record_files import RecordFile, exit_status, lines_to_keep, replace_file
from .records import Record
from .spans import Observer, Span
from .trees import difference, get_field, named_leaves, set_field, signature

__all__ = [
    "Observer",
    "RecordFile",
    "Span",
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
    "get_field",
    "has_training_metrics",
    "lines_to_keep",
    "log_user",
    "named_leaves",
    "replace_file",
    "require_metric",
    "set_field",
    "signature",
    "takes_rng",
    "to_host",
    "warn_missing_metric",
    "widen",
]


def check_mode(who: str, mode: str) -> str:
    """Return `mode` if it is `"min"` or `"max"`.

    Args:
        who: the callback, for the error.
        mode: how values compare: whether smaller or larger is better.

    Raises:
        ValueError: it is neither.

    >>> check_mode("EarlyStopping", "least")
    Traceback (most recent call last):
    ...
    ValueError: EarlyStopping needs mode 'min' or 'max', got 'least'.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"{who} needs mode 'min' or 'max', got {mode!r}.")
    return mode


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

    There is no warning while the metric may still appear: before the first evaluation of a callback with its
    first name, and while its training window is open.

    Args:
        who: the callback, for the message.
        metric: the name in the records, such as `"val/loss"`.
        loop: the run.
    """
    first, _, rest = metric.partition("/")
    silent = first in loop.callbacks and not any(name.startswith(f"{first}/") for name in loop.latest)
    opened = first == "train" and f"epoch/{rest}" in loop.latest
    if loop.epoch == 1 and metric not in loop.latest and not (silent or opened):
        warnings.warn(_missing(who, metric, loop), stacklevel=3)


def require_metric(who: str, metric: str, loop: Loop) -> None:
    """Check that a metric appeared in a run that reached its target; call it in `on_run_end`.

    Raises:
        ValueError: it never appeared; the message lists what did.
    """
    reached = loop.step > loop.first_step and loop.finished and loop.stopped is None and loop.error is None
    if reached and metric not in loop.latest:
        raise ValueError(_missing(who, metric, loop))


def _missing(who: str, metric: str, loop: Loop) -> str:
    records = f"{who} watches {metric!r}, but the records hold {sorted(loop.latest)}."
    return f"{records} Add Evaluate(...) or watch one of these."


def widen(leaf: jax.Array) -> jax.Array:
    """Return 16-bit and 8-bit floats as float32, and anything else unchanged.

    Averages that are kept in narrow floats lose small updates.

    >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
