"""Evaluate the state on other data during a run."""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import jax
from onstep import Cadence, Callback, Loop, evaluate, every
from onstep.checks import takes_rng, whole


class Averaged(Protocol):
    """A callback that knows another state to evaluate, such as EMA."""

    def apply(self, source: Any) -> Any:
        """The state to evaluate instead of the run's own."""
        ...


class Evaluate(Callback):
    """Evaluates the state on a set of data and logs `<name>/<metric>`.

    Every evaluation gives a step that takes a random key the same keys, so that values compare. A callback
    of the run with a method `evaluating(loop, name)`, as Progress has, is told after each batch.

    Args:
        step: `(state, batch) -> metrics`; a third required argument is a random key.
        data: an iterable of batches, read whole each time; each batch counts by its leading axis.
        name: the first part of the recorded names, and the callback's name; one a set.
        when: when to evaluate.
        using: a callback whose `apply(loop)` gives the state to evaluate: `using=ema`.
        steps: batches to use, for data without an end.

    Raises:
        ValueError: the data is empty, or no key was given to the run for a step that takes one.
    """

    def __init__(
        self,
        step: Any,
        data: Any,
        *,
        name: str = "val",
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        using: Averaged | None = None,
        steps: int | None = None,
    ):
        if steps is not None:
            whole(f"Evaluate {name!r}", "steps", steps, 1)
        self._random = takes_rng(step, f"The step of Evaluate {name!r}")
        self.step: Any = step
        self.data: Any = data
        self.name: str | None = name
        self.when: Cadence | int = when
        self.using: Averaged | None = using
        self.steps: int | None = steps

    def on_run_begin(self, loop: Loop) -> None:
        if isinstance(self.using, Callback):
            loop.carry(self.using)
        if self._random and loop.rng is None:
            raise ValueError(
                f"The step of Evaluate {self.name!r} takes a random key as its third argument. Pass one: rng=..."
            )

    def on_step_end(self, loop: Loop) -> None:
        state = self.using.apply(loop) if self.using is not None else loop.state
        key = None if loop.rng is None else jax.random.fold_in(loop.rng, zlib.crc32(str(self.name).encode()))
        asked = [getattr(callback, "evaluating", None) for callback in loop.callbacks.values()]
        watches = [begin(loop, str(self.name)) for begin in asked if begin is not None]

        def watch(done: int, total: int | None) -> None:
            for one in watches:
                one(done, total)

        means = evaluate(self.step, state, self.data, rng=key, steps=self.steps, mesh=loop.mesh, watch=watch)
        loop.log({f"{self.name}/{metric}": mean for metric, mean in means.items()})
