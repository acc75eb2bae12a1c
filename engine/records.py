"""Records: numbers on the host, and the history of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .checks import did_you_mean


@dataclass(frozen=True)
class Record:
    """Numbers on the host, as `on_log` receives them.

    Attributes:
        step: steps completed when the numbers were taken.
        epoch: epochs completed at that moment.
        values: the numbers by name: `train/loss`, `epoch/loss`, `val/accuracy`.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}), log_every=2)
    >>> @engine.on("log")
    ... def print_record(loop, record):
    ...     print(record)
    >>> result = engine.run(0.0, [1.0, 3.0, 5.0], epochs=1)
    Record(step=2, epoch=0, values={'train/loss': 2.0})
    Record(step=3, epoch=1, values={'epoch/loss': 3.0})
    Record(step=3, epoch=1, values={'train/loss': 5.0})
    """

    step: int
    epoch: int
    values: dict[str, float]


class History(Mapping[str, list[float]]):
    """Every value recorded by one call of `run`, by name, with the steps of each.

    >>> history = History()
    >>> history.add(Record(50, 0, {"train/loss": 0.5}))
    >>> history.add(Record(100, 1, {"train/loss": 0.25}))
    >>> history["train/loss"], history.steps("train/loss")
    ([0.5, 0.25], [50, 100])
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._steps: dict[str, list[int]] = {}

    def add(self, record: Record) -> None:
        """Append the values of a record."""
        for name, value in record.values.items():
            self._values.setdefault(name, []).append(value)
            self._steps.setdefault(name, []).append(record.step)

    def steps(self, name: str) -> list[int]:
        """Return the steps at which the values `history[name]` were recorded.

        Raises:
            KeyError: the name was never recorded.
        """
        self[name]
        return self._steps[name]

    def __getitem__(self, name: str) -> list[float]:
        if name not in self._values:
            similar = did_you_mean(name, self._values)
            raise KeyError(f"{name!r} was not recorded; the history holds {sorted(self._values)}.{similar}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}: {len(values)}' for name, values in self._values.items())})"


class Latest(dict[str, float]):
    """The newest recorded value of every name.

    >>> Latest({"train/loss": 0.5})["loss"]
    Traceback (most recent call last):
    ...
    KeyError: "'loss' is not recorded yet; loop.latest holds ['train/loss']. Did you mean train/loss?"
    """

    def __missing__(self, name: str) -> float:
        similar = did_you_mean(name, self)
        raise KeyError(f"{name!r} is not recorded yet; loop.latest holds {sorted(self)}.{similar}")


def improves(value: float, best: float | None, *, mode: str = "min", min_delta: float = 0.0) -> bool:
    """Return whether `value` beats `best` by more than `min_delta`.

    Ties, NaN and infinities do not. Any finite value beats a `best` of None.

    Args:
        value: the new value.
        best: the best value so far, or None.
        mode: `"min"` if smaller is better, `"max"` if larger is.
        min_delta: what the improvement must exceed, absolute.

    >>> improves(0.4, 0.5), improves(0.5, 0.5), improves(0.6, 0.5, mode="max")
    (True, False, True)
    """
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if mode == "min" else value - best
    return gain > min_delta
