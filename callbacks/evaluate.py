"""Evaluate the state on other data during a run."""

from __future__ import annotations

import functools
import zlib
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

from onstep import Cadence, Callback, Loop, evaluate, every
from onstep.tools import check_data, check_evaluation, check_int, fold_in, takes_rng


class Averaged(Protocol):
    """A callback that can provide another state to evaluate, such as `EMA`."""

    def apply(self, source: Any) -> Any:
        """Return the state to evaluate instead of the run's."""
        ...


@dataclass(eq=False, repr=False)
class Evaluate(Callback):
    """Evaluates the state on a data set and records the mean of each metric as `<name>/<metric>`.

    Use it for validation during training, once for each data set or averaged state. A step that takes a random key
    gets the same keys in every evaluation, so the values are comparable. Each batch is reported with
    `loop.progress`, which `Progress` shows.

    Args:
        step: `(state, batch) -> metrics`; a third required argument is a random key.
        data: an iterable of batches, read completely in each evaluation. Unless it can be read only once, its first
            batch is also drawn when the run begins, to trace the step, so that an error in it is raised before
            training starts.
        name: the first part of the recorded names, and the callback's name. Give each data set its own.
        when: when to evaluate; at the end of every epoch by default.
        using: a callback whose `apply(loop)` returns the state to evaluate, such as `using=ema`.
        steps: the number of batches to use, for data without an end.
        weight: the name of a metric that is the weight of its batch; by default its number of examples counts, as
            `onstep.evaluate` explains.

    Raises:
        TypeError: `using` has no method `apply`.
        ValueError: `data` yields no batch, the number of examples is unknown, or `step` takes a random key and the
            run has none.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> validation = Evaluate(lambda state, batch: {"error": abs(state - batch)}, [4.0, 6.0])
    >>> engine = Engine(lambda state, batch: (state + batch, {}), [validation])
    >>> engine.run(jnp.float32(0), [1.0], epochs=3).history["val/error"]
    [4.0, 3.0, 2.0]
    """

    step: Any
    data: Any
    _: KW_ONLY
    name: str | None = "val"
    when: Cadence | int = every(epochs=1)  # noqa: RUF009 (frozen)
    using: Averaged | None = None
    steps: int | None = None
    weight: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Evaluate needs a name for its records, such as 'val', got {self.name!r}.")
        if hasattr(self.step, "__iter__") and callable(self.data):
            raise TypeError(
                f"Evaluate takes the step first, then the data, got {type(self.step).__name__} and "
                f"{type(self.data).__name__}. Swap them: Evaluate(step, data)."
            )
        if self.steps is not None:
            check_int(f"Evaluate {self.name!r}", "steps", self.steps, 1)
        if self.using is not None and not callable(getattr(self.using, "apply", None)):
            raise TypeError(
                f"Evaluate {self.name!r} needs using= to have apply(loop), such as an EMA, got {self.using!r:.80}."
            )
        self._random = takes_rng(self.step, f"The step of Evaluate {self.name!r}")
        check_data(self.data)

    def on_run_begin(self, loop: Loop) -> None:
        if isinstance(self.using, Callback):
            loop.carry(self.using)  # an error if it is not in the run
        if self._random and loop.rng is None:
            raise ValueError(
                f"The step of Evaluate {self.name!r} takes a random key as its third argument. Pass one: rng=..."
            )
        once, epochs = hasattr(self.data, "__next__"), self.when.epochs if isinstance(self.when, Cadence) else ()
        if once and self.steps is None and any((loop.epochs or 0) // n - loop.epoch // n > 1 for n in epochs):
            raise ValueError(
                f"Evaluate {self.name!r} reads its data several times, but a {type(self.data).__name__} can be read "
                "only once. Pass a list or a callable epoch -> iterable; or steps=, if it has no end."
            )
        if not loop.over and (self.using is None or isinstance(self.using, Callback)):  # others may have no state yet
            metrics = check_evaluation(self.step, self._state(loop), self.data, rng=loop.rng, mesh=loop.mesh)
            if self.weight is not None and metrics and self.weight not in metrics:
                raise ValueError(
                    f"Evaluate {self.name!r} needs the metric {self.weight!r} as the weight of a batch, but its step "
                    f"returns {metrics}."
                )
            loop.announce(f"{self.name}/{metric}" for metric in metrics if metric != self.weight)

    def on_step_end(self, loop: Loop) -> None:
        key = None if loop.rng is None else fold_in(loop.rng, zlib.crc32(str(self.name).encode()))
        watch = functools.partial(loop.progress, str(self.name))
        watch(0, self._batches())
        options: dict[str, Any] = {"rng": key, "steps": self.steps, "mesh": loop.mesh, "weight": self.weight}
        means = evaluate(self.step, self._state(loop), self.data, **options, watch=watch)
        loop.log({f"{self.name}/{metric}": mean for metric, mean in means.items()})

    def _state(self, loop: Loop) -> Any:
        return self.using.apply(loop) if self.using is not None else loop.state

    def _batches(self) -> int | None:
        """The number of batches of an evaluation, None if it is unknown."""
        try:
            return min(len(self.data), self.steps or len(self.data))
        except (TypeError, NotImplementedError):
            return self.steps
