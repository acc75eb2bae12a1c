"""Stop when a metric no longer improves."""

from __future__ import annotations

import math
from typing import Any

from onstep import Callback, Loop, Record, improves
from onstep.checks import appeared, watched, whole


class EarlyStopping(Callback):
    """Stops the run at the `patience`-th evaluation in a row without an improvement.

    An improvement is better than the best so far by more than `min_delta`; an equal value or a
    NaN is none. The stop is final: a later resume runs no step.

    Args:
        metric: the name in the records, such as `"val/loss"`.
        patience: evaluations without an improvement, >= 1.
        mode: `"min"` or `"max"`.
        min_delta: what an improvement must exceed, absolute, >= 0.
        name: the callback's name.

    Attributes:
        best: the best value so far, None before the first.
        misses: evaluations in a row without an improvement.

    Raises:
        ValueError: a number out of range; or, when the run ends, the metric never appeared.
    """

    def __init__(
        self, metric: str, *, patience: int, mode: str = "min", min_delta: float = 0.0, name: str | None = None
    ):
        whole("EarlyStopping", "patience", patience, 1)
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping needs mode 'min' or 'max', got {mode!r}.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping needs min_delta >= 0, got {min_delta}.")
        self.metric: str = metric
        self.patience: int = patience
        self.min_delta: float = min_delta
        self.name: str | None = name
        self.mode = mode
        self.best: float | None = None
        self.misses: int = 0

    def on_log(self, loop: Loop, record: Record) -> None:
        if self.metric in record.values and self.stalled(record.values[self.metric]):
            best = "its first value" if self.best is None else f"{self.best:.6g}"
            loop.stop(f"{self.metric} has not improved on {best} in {self.patience} evaluations")

    def stalled(self, value: float) -> bool:
        """Takes the next value; whether patience has run out."""
        if improves(value, self.best, mode=self.mode, min_delta=self.min_delta):
            self.best, self.misses = value, 0
        else:
            self.misses += 1
        return self.misses >= self.patience

    def on_epoch_end(self, loop: Loop) -> None:
        watched("EarlyStopping", self.metric, loop)

    def on_run_end(self, loop: Loop) -> None:
        appeared("EarlyStopping", self.metric, loop)

    def get_state(self) -> dict[str, Any]:
        return {"best": self.best, "misses": self.misses}

    def set_state(self, state: dict[str, Any]) -> None:
        self.best, self.misses = state["best"], state["misses"]
