"""Numbers on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """Numbers on the host: what `on_log` receives.

    Attributes:
        step: steps completed when the numbers were taken.
        epoch: epochs completed then.
        values: by name: `train/loss`, `epoch/loss`, `val/accuracy`.
    """

    step: int
    epoch: int
    values: dict[str, float]


class History(Mapping[str, list[float]]):
    """The values recorded by one call of run, by name, with their steps beside them."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._steps: dict[str, list[int]] = {}

    def add(self, record: Record) -> None:
        """Appends a record's values."""
        for name, value in record.values.items():
            self._values.setdefault(name, []).append(value)
            self._steps.setdefault(name, []).append(record.step)

    def steps(self, name: str) -> list[int]:
        """The steps at which `history[name]` was recorded."""
        self[name]
        return self._steps[name]

    def __getitem__(self, name: str) -> list[float]:
        if name not in self._values:
            raise KeyError(f"{name!r} was not recorded; the history holds {sorted(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}: {len(values)}' for name, values in self._values.items())})"


def improves(value: float, best: float | None, *, mode: str = "min", min_delta: float = 0.0) -> bool:
    """Whether `value` beats `best` by more than `min_delta`; an equal value, NaN and infinities never do."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if mode == "min" else value - best
    return gain > min_delta
