"""Numbers: what a step returns, read at due steps alone, as means and records."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from .means import Tally, fetch, merges
from .spans import WAIT, Spans

Metrics = dict[str, Any]
"""Scalars on the device by name; a value may be a clu metric, which merges exactly."""


def as_metrics(given: Any, who: str) -> Metrics:
    """A step's metrics as a flat dict of scalars and clu metrics.

    Raises:
        TypeError: neither a dict with string keys nor a `clu.metrics.Collection`.
        ValueError: a value is not a scalar.
    """
    clu = sys.modules.get("clu.metrics")  # whoever returns a collection has imported it
    if clu is not None and isinstance(given, clu.Collection):
        given = {name: getattr(given, name) for name in type(given).__annotations__ if not name.startswith("_")}
    if not isinstance(given, dict) or any(not isinstance(name, str) for name in given):
        raise TypeError(f"{who} needs metrics as a dict of scalars by name, got {type(given).__name__}: {given!r:.80}.")
    return {name: value if merges(value) else _scalar(value, name, who) for name, value in given.items()}


def _scalar(value: Any, name: str, who: str) -> jax.Array:
    try:
        array = jnp.asarray(value)
    except TypeError:
        raise TypeError(f"{who} needs scalar metrics, got {type(value).__name__} for {name!r}.") from None
    if array.ndim:
        raise ValueError(f"{who} needs scalar metrics, got shape {array.shape} for {name!r}. Reduce it, e.g. .mean().")
    return array


class Meter:
    """The steps' metrics: still on the device (`pending`), and as open means on the host."""

    def __init__(self) -> None:
        self.pending: list[Metrics] = []
        self.windows: dict[str, dict[str, Tally]] = {"train": {}, "epoch": {}}

    def observe(self, spans: Spans) -> None:
        """Report every read as a span from now on."""
        spans.instrument(self, WAIT, "read")

    def read(self) -> None:
        """Fetches what is pending into the open means: the one place that waits for metrics."""
        steps, self.pending = self.pending, []
        for name, values in fetch(steps).items():
            for window in self.windows.values():
                window.setdefault(name, Tally()).add(values)

    def close(self, window: str) -> dict[str, float]:
        """The means of a window by full name (`train/loss`); the window starts again."""
        self.read()
        tallies, self.windows[window] = self.windows[window], {}
        return {f"{window}/{name}": tally.mean(name) for name, tally in tallies.items()}

    def get_state(self) -> dict[str, Any]:
        """The open windows, pending steps included."""
        self.read()
        return {w: {name: t.get_state() for name, t in tallies.items()} for w, tallies in self.windows.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes back open windows."""
        self.windows = {w: {n: Tally.from_state(t) for n, t in tallies.items()} for w, tallies in state.items()}
