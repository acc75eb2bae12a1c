"""Stop when a metric no longer improves."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from onstep import Callback, Loop, Record, improves
from onstep.tools import check_int, check_mode, warn_missing_metric


@dataclass(eq=False, repr=False)
class EarlyStopping(Callback):
    """Stops the run when a metric has not improved in `patience` evaluations in a row.

    A value counts as an improvement if it beats the best so far by more than `min_delta`. Ties, NaN and
    infinities do not. The stop is final: a run that is resumed later runs no step.

    Args:
        metric: the name in the records, such as `"val/loss"`.
        patience: how many evaluations in a row may pass without an improvement, >= 1; the last of them stops
            the run.
        mode: `"min"` if smaller values are better, `"max"` if larger ones are.
        min_delta: by how much a value must beat the best one, absolute, >= 0.
        name: the callback's name.

    Attributes:
        best: the best value so far, None before the first.
        misses: evaluations in a row without an improvement.

    Raises:
        TypeError: `metric` is not a name.
        ValueError: a number is out of range.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> from onstep.testing import LogValues, counting_step
    >>> losses = LogValues({1: {"val/loss": 0.5}, 2: {"val/loss": 0.6}, 3: {"val/loss": 0.7}})
    >>> engine = Engine(counting_step, [losses, EarlyStopping("val/loss", patience=2)])
    >>> engine.run(jnp.int32(0), range(9), epochs=1).stopped
    "val/loss has not fallen below 0.5 in 2 evaluations (mode='min')"
    """

    metric: str
    _: KW_ONLY
    patience: int
    mode: str = "min"
    min_delta: float = 0.0
    name: str | None = None
    best: float | None = field(default=None, init=False)
    misses: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_int("EarlyStopping", "patience", self.patience, 1)
        if not isinstance(self.metric, str):
            raise TypeError(f"EarlyStopping needs the name of a metric, such as 'val/loss', got {self.metric!r}.")
        check_mode("EarlyStopping", self.mode, self.metric)
        if not isinstance(self.min_delta, (int, float)) or not 0 <= self.min_delta < math.inf:
            raise ValueError(f"EarlyStopping needs a finite min_delta >= 0, got {self.min_delta!r}.")

    def on_epoch_begin(self, loop: Loop) -> None:
        warn_missing_metric("EarlyStopping", self.metric, loop)

    def on_log(self, loop: Loop, record: Record) -> None:
        warn_missing_metric("EarlyStopping", self.metric, loop, record)
        if self.metric in record.values and self.stalled(record.values[self.metric]):
            count = f"{self.patience} evaluation{'s' * (self.patience > 1)}"
            if self.best is None:
                loop.stop(f"{self.metric} had no finite value in {count}")
            else:
                by = f" by more than {self.min_delta:g}" if self.min_delta else ""
                way = "fallen below" if self.mode == "min" else "risen above"
                loop.stop(f"{self.metric} has not {way} {self.best:.6g}{by} in {count} (mode={self.mode!r})")

    def stalled(self, value: float) -> bool:
        """Take the next value, and return whether patience has run out.

        >>> stopping = EarlyStopping("val/loss", patience=2)
        >>> [stopping.stalled(loss) for loss in (0.5, 0.6, 0.7)]
        [False, False, True]
        """
        if improves(value, self.best, mode=self.mode, min_delta=self.min_delta):
            self.best, self.misses = value, 0
        else:
            self.misses += 1
        return self.misses >= self.patience

    def on_epoch_end(self, loop: Loop) -> None:
        if not loop.over:  # otherwise on_run_end follows
            warn_missing_metric("EarlyStopping", self.metric, loop)

    def on_run_end(self, loop: Loop) -> None:
        warn_missing_metric("EarlyStopping", self.metric, loop)

    def get_state(self) -> dict[str, Any]:
        return {"best": self.best, "misses": self.misses}

    def set_state(self, state: dict[str, Any]) -> None:
        self.best, self.misses = state["best"], state["misses"]
