"""Record the learning rate with the training metrics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Callback, Loop, Record
from onstep.tools import get_fields, has_training_metrics, signature


class LearningRate(Callback):
    """Records `lr`, the learning rate of the last update, with every window of training metrics.

    It is the value at the window's last step, not a mean. A schedule is evaluated at the
    optimizer's own count, which does not move when `optax.MultiSteps` or `optax.apply_if_finite` skips an
    update. Without a schedule, the rate is read from `optax.inject_hyperparams`. If there are several, each is
    named by its path: `lr/encoder`, `lr/decoder`.

    Args:
        schedule: the optimizer's schedule, `count -> rate`; None to read the rate from the state.
        of: the field of the state that holds the optimizer's state, `"gen.opt_state"` or `"0.opt_state"` for a
            nested one; an index; a tuple of fields; or None for the whole state.
        name: the name of the record, and of the callback.

    Raises:
        TypeError: `schedule` is not a function.
        ValueError: the state has no such field, or the field has no count or learning rate (when the run
            begins).

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from onstep import Engine
    >>> schedule = optax.linear_schedule(1.0, 0.0, 10)
    >>> sgd = optax.sgd(schedule)
    >>> def step(state, batch):
    ...     _, opt_state = sgd.update(batch, state["opt_state"])
    ...     return {"opt_state": opt_state}, {"loss": batch}
    >>> engine = Engine(step, [LearningRate(schedule)], log_every=2)
    >>> history = engine.run({"opt_state": sgd.init(0.0)}, [1.0] * 4, epochs=1).history
    >>> [round(rate, 3) for rate in history["lr"]]
    [0.9, 0.7]
    """

    def __init__(
        self,
        schedule: Callable[[Any], Any] | None = None,
        *,
        of: str | int | tuple[str | int, ...] | None = "opt_state",
        name: str = "lr",
    ):
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"LearningRate needs schedule to be a function of the count, got {schedule!r}. "
                "Leave it out to read the rate from optax.inject_hyperparams."
            )
        self.schedule: Callable[[Any], Any] | None = schedule
        self.of: str | int | tuple[str | int, ...] | None = of
        self.name: str | None = name
        if not isinstance(name, str):
            raise TypeError(f"LearningRate needs a name for its records, such as 'lr', got {name!r}.")
        self._wanted = "count" if schedule else "learning_rate"
        self._rate = jax.jit(lambda count: schedule(jnp.maximum(count - 1, 0))) if schedule else None

    def on_run_begin(self, loop: Loop) -> None:
        kinds = signature(self._select(loop.state))
        parts = [name.removesuffix("/value").split("/") for name in kinds]  # NNX adds this part to every path
        wanted = [i for i, kind in enumerate(kinds.values()) if parts[i][-1] == self._wanted and kind.endswith("[]")]
        if not wanted:
            where = "the state" if self.of is None else self.of
            raise ValueError(
                f"LearningRate needs a scalar {self._wanted!r} in {where}, got {[*kinds][:8]}. "
                "With a schedule, of= must name the state of the optimizer that uses it; without one, make the "
                "optimizer with optax.inject_hyperparams."
            )
        wanted = wanted[:1] if self._rate else wanted  # all counts of one optimizer are equal
        paths = [parts[i] for i in wanted]
        head = _shared(paths)
        tail = _shared([path[head:][::-1] for path in paths])
        names = ["/".join([str(self.name), *path[head : len(path) - tail]]) for path in paths]
        self._leaves = dict(zip(names, wanted, strict=True))

    def on_log(self, loop: Loop, record: Record) -> None:
        if has_training_metrics(record):
            leaves = jax.tree.leaves(self._select(loop.state))
            values = {name: leaves[i] for name, i in self._leaves.items()}
            loop.log({name: self._rate(count) for name, count in values.items()} if self._rate else values)

    def _select(self, state: Any) -> Any:
        return get_fields(state, self.of, "LearningRate")


def _shared(paths: list[list[str]]) -> int:
    """Return the length of the common prefix of all paths."""
    return len([*takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))])
