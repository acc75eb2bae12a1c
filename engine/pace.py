"""Keep few calls queued, without waiting more often than that takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

SHORT = 1e-4
"""Seconds of a call below which waiting for each one costs more than it is good for."""
TOGETHER = 16
"""Short calls that are waited for at once."""
LONG = 0.1
"""Seconds of a call beyond which a signal or a cadence in seconds would notice it."""
FIRST = 8
"""Steps of a call while it is not known how long they take."""


class Pace:
    """Lets so many calls be queued; short ones, whose queue nobody would notice, by sixteens more.

    Args:
        most: the calls.
        clock: gives the time in seconds.
        cut: whether that may say how many steps a call runs; where several processes run them
            together it may not.
    """

    def __init__(self, most: int, clock: Callable[[], float], cut: bool):
        self._most, self._clock, self._cut = most, clock, cut
        self._asked: tuple[int, float] | None = None  # steps completed, and when

    def steps(self, step: int) -> int:
        """The most steps for a call, with `step` completed: by how long those since the last time took.

        How a run is cut into calls does not change its bytes, so a clock may decide.
        """
        if not self._cut:
            return sys.maxsize
        before, self._asked = self._asked, (step, self._clock())
        if before is None:
            return FIRST
        ran, seconds = step - before[0], self._asked[1] - before[1]
        return max(1, int(LONG * ran / max(seconds, 1e-9)))

    def start(self, pending: list[Any]) -> int:
        """Begins with what these calls returned; the number of them at which to wait."""
        self._since, self._from = self._clock(), len(pending)
        return max(self._most, len(pending)) + 1

    def wait(self, pending: list[Any]) -> int:
        """Waits for all calls but the newest; the number of them at which to wait again."""
        _wait(pending[~self._most])
        now, calls = self._clock(), len(pending)
        short = now - self._since < SHORT * (calls - self._from)
        self._since, self._from = now, calls
        return calls + (TOGETHER if short else 1)


def _wait(metrics: dict[str, Any]) -> None:
    """Waits for the call that returned these metrics: they are its outputs that are not donated."""
    for value in getattr(metrics, "columns", metrics).values():
        try:
            value.block_until_ready()
        except AttributeError:  # a clu metric, or a plain number
            jax.block_until_ready(value)
        return
