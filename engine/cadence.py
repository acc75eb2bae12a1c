"""Cadences: when something is due, as pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

from .checks import check_int


@dataclass(frozen=True, repr=False)
class Cadence:
    """When something is due. Make one with `every` or `at`, and combine several with `|`.

    Steps and epochs are counted from 1 over the whole run, so a resumed run stays on schedule. An empty cadence is
    never due.

    Attributes:
        steps: due at every multiple of any of these step counts.
        epochs: due at the step that completes every multiple of any of these epoch counts.
        seconds: due when any of these times has passed since it was last due.
        points: due at exactly these steps.

    >>> cadence = every(100) | at(1, 10)
    >>> [step for step in (1, 2, 10, 100, 150) if cadence.due(step)]
    [1, 10, 100]
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
        """Return the first due step after `step`, or infinity. Epochs and seconds are not considered.

        >>> every(100).next(150), at(1, 10).next(10)
        (200, inf)
        """
        if not self.points and len(self.steps) == 1:  # nearly always
            return (step // self.steps[0] + 1) * self.steps[0]
        later = self.points[bisect_right(self.points, step) :][:1]
        return min([(step // n + 1) * n for n in self.steps] + list(later), default=math.inf)

    def due(self, step: int, *, epoch: int = 0, elapsed: float = 0.0) -> bool:
        """Return whether `step` is due.

        Args:
            step: steps completed.
            epoch: the number of the epoch that this step completes, 0 if it completes none.
            elapsed: seconds since this was last due, or since the run began.

        >>> every(epochs=2).due(80, epoch=2)
        True
        """
        return (
            (step > 0 and self.next(step - 1) == step)
            or (epoch > 0 and any(epoch % n == 0 for n in self.epochs))
            or any(elapsed >= s for s in self.seconds)
        )

    def __repr__(self) -> str:
        units = {"steps": self.steps, "epochs": self.epochs, "seconds": self.seconds}
        terms = [f"every({unit}={n})" for unit, counts in units.items() for n in counts]
        terms += [f"at({', '.join(map(str, self.points))})"] if self.points else []
        return " | ".join(terms) or "Cadence()"


def every(steps: int | None = None, *, epochs: int | None = None, seconds: float | None = None) -> Cadence:
    """Return a cadence that is due every n steps, epochs or seconds.

    `every(100)` is due at steps 100, 200, ..., never at 0. `every(epochs=1)` is due at the step that completes an
    epoch. `every(seconds=60)` is checked whenever the loop is between compiled calls.

    Args:
        steps, epochs: the interval, a whole number >= 1.
        seconds: the interval, > 0.

    Raises:
        ValueError: not exactly one unit, or a number out of range.

    >>> every(100) | every(epochs=1)
    every(steps=100) | every(epochs=1)
    """
    given = {k: v for k, v in (("steps", steps), ("epochs", epochs), ("seconds", seconds)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"every needs one of steps, epochs and seconds, got {given or 'none'}. Combine with |.")
    if steps is not None:
        return Cadence(steps=(check_int("every", "steps", steps, 1),))
    if epochs is not None:
        return Cadence(epochs=(check_int("every", "epochs", epochs, 1),))
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"every needs seconds > 0, got {seconds!r}.")
    return Cadence(seconds=(seconds,))


def at(*steps: int) -> Cadence:
    """Return a cadence that is due at exactly these steps, counted from 1.

    Raises:
        ValueError: no step, or one that is not a positive whole number.

    >>> at(1, 10) | every(steps=100)
    every(steps=100) | at(1, 10)
    """
    if not steps:
        raise ValueError("at needs the steps at which something is due, got none.")
    for n in steps:
        if type(n) is int and n < 1:
            raise ValueError(
                f"at needs steps to be a whole number >= 1, got {n}. Steps are counted from 1. Before the first one "
                "comes on_run_begin, and after the last one on_run_end."
            )
    return Cadence(points=tuple(sorted({check_int("at", "steps", n, 1) for n in steps})))


def as_cadence(value: Cadence | int, who: str) -> Cadence:
    """Return a cadence unchanged, and a plain int n as `every(steps=n)`."""
    if isinstance(value, Cadence):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and value > 0:
        return every(steps=int(value))
    raise ValueError(
        f"{who} needs a cadence such as every(steps=100) or every(epochs=1), or a whole number of steps > 0, got "
        f"{value!r}."
    )


ALWAYS = every(steps=1)


class Trigger:
    """Tracks a cadence through a run and caches the next due step.

    Args:
        cadence: when it fires.
        clock: the time in seconds.
        step: steps completed so far.

    Attributes:
        next_step: the next due step, without regard to epochs and seconds.
        deadline: clock time at which it is next due, infinity without a cadence in seconds.
    """

    def __init__(self, cadence: Cadence, clock: Callable[[], float], step: int = 0):
        self.cadence: Cadence = cadence
        self._clock = clock
        self._interval = min(cadence.seconds, default=math.inf)
        self._only_steps = not (cadence.epochs or cadence.seconds)
        self.start(step)

    def start(self, step: int) -> None:
        """Start with `step` steps completed."""
        self._fired_at = -1
        self.next_step: float = self.cadence.next(step)
        self.deadline: float = self._clock() + self._interval if self.cadence.seconds else math.inf

    def fires(self, step: int, epoch: int = 0) -> bool:
        """Return whether it is due at `step`, which completes `epoch` (0 if it completes none), and advance.

        It is due at most once at a step, even if the end of the epoch becomes known only later.
        """
        due = step >= self.next_step
        if due:
            self.next_step = self.cadence.next(step)
        if self._only_steps:
            return due
        late = self.deadline < math.inf and self._clock() >= self.deadline
        due = step != self._fired_at and (due or late or self.cadence.due(step, epoch=epoch))
        if due:
            self._fired_at = step
        if due and self.deadline < math.inf:
            self.deadline = self._clock() + self._interval
        return due
