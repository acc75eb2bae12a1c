"""Metrics: averages them over log windows and epochs, and reads them from the device only when that is due."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from .means import Mean, fetch, merges
from .spans import WAIT, Spans

Metrics = dict[str, Any]
"""Scalars on the device by name; a value may be a clu metric, which merges exactly."""


def as_metrics(given: Any, who: str) -> Metrics:
    """Return the metrics of a step as a flat dict of scalars and clu metrics.

    Raises:
        TypeError: they are neither a dict with string keys nor a `clu.metrics.Collection`, or a value is no number.
        ValueError: a value is not a real scalar.
    """
    clu = sys.modules.get("clu.metrics")  # a step that returns a collection has imported it
    if clu is not None and isinstance(given, clu.Collection):
        given = {name: getattr(given, name) for name in type(given).__annotations__ if not name.startswith("_")}
    if not isinstance(given, dict) or any(not isinstance(name, str) for name in given):
        advice = ' Give it a name: return state, {"loss": loss}.' if isinstance(given, jax.Array) else ""
        raise TypeError(f"{who} needs metrics as a dict of scalars by name, got {describe_result(given)}.{advice}")
    return {name: value if merges(value) else _scalar(value, name, who) for name, value in given.items()}


def describe_result(result: Any) -> str:
    """Return what a user's function returned, for errors: arrays by dtype and shape, not as tracers.

    >>> describe_result(jnp.zeros(3)), describe_result(None), describe_result({1: 2.0})
    ('an array float32[3]', 'None', 'dict with the keys [1]')
    """
    if isinstance(result, jax.Array):
        return f"an array {result.dtype}[{','.join(map(str, result.shape))}]"
    if isinstance(result, dict):
        return f"{type(result).__name__} with the keys {list(result)}"
    return "None" if result is None else type(result).__name__


def _scalar(value: Any, name: str, who: str) -> jax.Array:
    try:
        array = jnp.asarray(value)
    except TypeError:
        raise TypeError(f"{who} needs scalar metrics, got {type(value).__name__} for {name!r}.") from None
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{who} needs numbers as metrics, got {array.dtype} for {name!r}.")
    if array.ndim:
        raise ValueError(f"{who} needs scalar metrics, got shape {array.shape} for {name!r}. Reduce it, e.g. .mean().")
    return array


class Windows:
    """The metrics of a run's steps: those still on the device, and the open means on the host.

    Attributes:
        pending: the metrics of calls that have not been read yet.
    """

    def __init__(self) -> None:
        self.pending: list[Metrics] = []
        self._means: dict[str, dict[str, Mean]] = {"train": {}, "epoch": {}}

    def observe(self, spans: Spans) -> None:
        """Report every read as a span from now on."""
        spans.instrument(self, WAIT, "read")

    def read(self) -> None:
        """Read the pending metrics into the means of both windows, waiting for the device."""
        steps, self.pending = self.pending, []
        for name, values in fetch(steps).items():
            for means in self._means.values():
                means.setdefault(name, Mean()).add(values)

    def take_means(self, window: str) -> dict[str, float]:
        """Return the means of a window by full name (`train/loss`), and start the window again."""
        self.read()
        means, self._means[window] = self._means[window], {}
        return {f"{window}/{name}": mean.value(name) for name, mean in means.items()}

    def get_state(self) -> dict[str, Any]:
        """Return the open windows, pending steps included."""
        self.read()
        return {w: {name: mean.get_state() for name, mean in means.items()} for w, means in self._means.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore open windows."""
        self._means = {w: {n: Mean.from_state(m) for n, m in means.items()} for w, means in state.items()}
