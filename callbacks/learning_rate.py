"""Record the learning rate beside the training metrics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Callback, Loop, Record
from onstep.trees import get_field, signature


class LearningRate(Callback):
    """Records `lr`, the learning rate of the last update, whenever a window of training metrics is.

    It is the value at that step, no mean. With a schedule it is evaluated at the optimizer's own
    count, which stands still where `optax.MultiSteps` or `optax.apply_if_finite` skips an update.
    Without, it is found where `optax.inject_hyperparams` keeps it; of several each gets a name by
    its place: `lr/encoder`, `lr/decoder`.

    Args:
        schedule: the optimizer's, `count -> rate`.
        of: the field of the state that holds the optimizer's, `"gen.opt_state"` for a nested one,
            None for the whole state.
        name: of the record, and the callback's name.

    Raises:
        TypeError: `schedule` is no function.
        ValueError: the state has no such field, or it holds no count or learning rate (at the start).
    """

    def __init__(self, schedule: Callable[[Any], Any] | None = None, *, of: str | None = "opt_state", name: str = "lr"):
        if schedule is not None and not callable(schedule):
            raise TypeError(f"LearningRate needs a schedule, a function of the count, got {schedule!r}.")
        self.of: str | None = of
        self.name: str | None = name
        self._wanted = "count" if schedule else "learning_rate"
        self._rate = jax.jit(lambda count: schedule(jnp.maximum(count - 1, 0))) if schedule else None

    def on_run_begin(self, loop: Loop) -> None:
        kinds = signature(self._select(loop.state))
        parts = [name.removesuffix("/value").split("/") for name in kinds]  # NNX has one more part behind each
        wanted = [i for i, kind in enumerate(kinds.values()) if parts[i][-1] == self._wanted and kind.endswith("[]")]
        if not wanted:
            raise ValueError(
                f"LearningRate needs a scalar {self._wanted!r} in {self.of or 'the state'}, got {[*kinds][:8]}. "
                "A schedule needs the state of the optimizer that uses it; without one, make the optimizer with "
                "optax.inject_hyperparams."
            )
        wanted = wanted[:1] if self._rate else wanted  # the counts of one optimizer agree
        paths = [parts[i] for i in wanted]
        head = _shared(paths)
        tail = _shared([path[head:][::-1] for path in paths])
        names = ["/".join([str(self.name), *path[head : len(path) - tail]]) for path in paths]
        self._leaves = dict(zip(names, wanted, strict=True))

    def on_log(self, loop: Loop, record: Record) -> None:
        if any(name.startswith("train/") for name in record.values):
            leaves = jax.tree.leaves(self._select(loop.state))
            values = {name: leaves[i] for name, i in self._leaves.items()}
            loop.log({name: self._rate(count) for name, count in values.items()} if self._rate else values)

    def _select(self, state: Any) -> Any:
        return state if self.of is None else get_field(state, self.of, "LearningRate")


def _shared(paths: list[list[str]]) -> int:
    """How many parts all paths begin with."""
    return len([*takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))])
