"""When something is due: pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from numbers import Integral

from . import checks


@dataclass(frozen=True, repr=False)
class Cadence:
    """When something is due; made by `every` and `at`, combined by `|`.

    Steps and epochs are counted from 1 and absolute, so a resumed run keeps the rhythm.
    """

    steps: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    points: tuple[int, ...] = ()

    def __or__(self, other: Cadence | int) -> Cadence:
        other = as_cadence(other, "A cadence combined by |")
        return Cadence(
            self.steps + other.steps,
            self.epochs + other.epochs,
            self.seconds + other.seconds,
            tuple(sorted({*self.points, *other.points})),
        )

    __ror__ = __or__

    def next(self, step: int) -> float:
        """The first step after `step` that is due by its number; `inf` if there is none."""
        if not self.points and len(self.steps) == 1:  # nearly always
            return (step // self.steps[0] + 1) * self.steps[0]
        later = self.points[bisect_right(self.points, step) :][:1]
        return min([(step // n + 1) * n for n in self.steps] + list(later), default=math.inf)

    def due(self, step: int, *, epoch: int = 0, elapsed: float = 0.0) -> bool:
        """Whether `step` is due.

        Args:
            step: steps completed.
            epoch: epochs completed by this very step, 0 if it completes none.
            elapsed: seconds since this was last due, or since the run began.
        """
        return (
            (step > 0 and self.next(step - 1) == step)
            or (epoch > 0 and any(epoch % n == 0 for n in self.epochs))
            or any(elapsed >= s for s in self.seconds)
        )

    def __repr__(self) -> str:
        units = {"steps": self.steps, "epochs": self.epochs, "seconds": self.seconds}
        terms = [f"every({unit}={n})" for unit, counts in units.items() for n in counts]
        return " | ".join(terms + ([f"at({', '.join(map(str, self.points))})"] if self.points else []))


def every(steps: int | None = None, *, epochs: int | None = None, seconds: float | None = None) -> Cadence:
    """Due again and again: every so many steps, epochs or seconds.

    `every(100)` is due at steps 100, 200, ...; never at 0. `every(epochs=1)` is due at the
    step that completes an epoch. `every(seconds=60)` is looked at whenever the loop is on
    the host.

    Raises:
        ValueError: not exactly one unit, or not a positive number.

    >>> every(100) | every(epochs=1)
    every(steps=100) | every(epochs=1)
    """
    given = {k: v for k, v in (("steps", steps), ("epochs", epochs), ("seconds", seconds)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"every needs one of steps, epochs and seconds, got {given or 'none'}. Combine with |.")
    if steps is not None:
        return Cadence(steps=(checks.whole("every", "steps", steps, 1),))
    if epochs is not None:
        return Cadence(epochs=(checks.whole("every", "epochs", epochs, 1),))
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"every needs seconds > 0, got {seconds!r}.")
    return Cadence(seconds=(seconds,))


def at(*steps: int) -> Cadence:
    """Due at exactly these steps, counted from 1.

    Raises:
        ValueError: no step, or one that is not a positive whole number.

    >>> at(1, 10) | every(steps=100)
    every(steps=100) | at(1, 10)
    """
    if not steps:
        raise ValueError("at needs the steps at which something is due, got none.")
    return Cadence(points=tuple(sorted({checks.whole("at", "steps", n, 1) for n in steps})))


def as_cadence(value: Cadence | int, who: str) -> Cadence:
    """A cadence as given, or `every(steps=n)` for a plain int n."""
    if isinstance(value, Cadence):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and value > 0:
        return every(steps=int(value))
    raise ValueError(f"{who} needs a cadence such as every(steps=100) or a whole number > 0, got {value!r}.")


ALWAYS = every(steps=1)
