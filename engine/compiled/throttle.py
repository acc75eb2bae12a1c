"""Throttle: how many calls are in flight, and how many steps a call runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

from ..means import NoMetrics

SHORT = 1e-4
"""For calls shorter than this, in seconds, waiting for each one costs more than it gains."""
TOGETHER = 16
"""Very short calls are waited for in groups of this size."""
LONG = 0.1
"""Seconds of a call beyond which it would delay a signal or a cadence in seconds."""
FIRST = 8
"""Steps of a call while their duration is unknown."""


class Throttle:
    """Bounds the number of calls in flight. Very short calls are awaited in groups of 16, which is cheaper.

    Args:
        most: calls that may be in flight.
        clock: the time in seconds.
        adapt: whether the number of steps in a call depends on measured time. Off with several processes, which must
            make identical calls.
    """

    def __init__(self, most: int, clock: Callable[[], float], adapt: bool):
        self._most, self._clock, self._adapt = most, clock, adapt
        self._asked: tuple[int, float] | None = None  # steps completed at the last `most_steps`, and its time

    def most_steps(self, step: int) -> int:
        """Return the most steps for the next call, from the duration of the steps since the last call of this method.

        How a run is split into calls does not affect its results, so timing may decide it.

        Args:
            step: steps completed.
        """
        if not self._adapt:
            return sys.maxsize
        before, self._asked = self._asked, (step, self._clock())
        if before is None:
            return FIRST
        steps, seconds = step - before[0], self._asked[1] - before[1]
        return max(1, int(LONG * steps / max(seconds, 1e-9)))

    def start(self, pending: list[Any]) -> int:
        """Start with the metrics of these calls; return the number of pending calls at which to wait next."""
        self._since, self._from = self._clock(), len(pending)
        return max(self._most, len(pending)) + 1

    def wait(self, pending: list[Any]) -> int:
        """Wait for all calls but the newest ones; return the number of pending calls at which to wait next."""
        _wait(pending[~self._most])
        now, calls = self._clock(), len(pending)
        short = now - self._since < SHORT * (calls - self._from)
        self._since, self._from = now, calls
        return calls + (TOGETHER if short else 1)


def _wait(metrics: dict[str, Any]) -> None:
    """Wait for the call that returned these metrics: they are its only outputs that are never donated."""
    metrics = getattr(metrics, "columns", metrics)
    for value in [metrics.done] if isinstance(metrics, NoMetrics) else metrics.values():
        try:
            value.block_until_ready()
        except AttributeError:  # a clu metric, or a plain number
            jax.block_until_ready(value)
        return
