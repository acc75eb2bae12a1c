"""Result: how a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from .callback import Callback, Carry, find_carry
from .data.stream import BatchStream
from .records import History
from .snapshot import Snapshot
from .trees import State
from .views import result_html

_SHOWN = 6
"""How many values a repr shows."""


@dataclass(frozen=True, repr=False)
class Result:
    """How a run ended. Pass it to `run` as the state to continue the run.

    Attributes:
        state: the last state; yours to keep.
        step: steps completed.
        epoch: epochs completed.
        stopped: the reason passed to `loop.stop`, None if the run reached its target.
        history: every value recorded by this call of `run`.
        latest: the newest value of every name.
        snapshot: the run at its end.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}))
    >>> result = engine.run(jnp.int32(0), [1, 2, 3], epochs=1)
    >>> result
    Result(step=3, epoch=1, stopped=None, latest={'epoch/loss': 2, 'train/loss': 2})
    >>> engine.run(result, [1, 2, 3], epochs=2).step
    6
    """

    state: State
    step: int
    epoch: int
    stopped: str | None
    history: History
    latest: dict[str, float]
    snapshot: Snapshot
    _callbacks: dict[str, Callback] = field(repr=False)
    _stream: BatchStream = field(repr=False)

    def carry(self, callback: Callback) -> Carry:
        """Return the carry of a callback of the run.

        Raises:
            ValueError: the callback is not one of the run's, or has no compiled half.
        """
        return find_carry(self.snapshot.tree["carries"], self._callbacks, callback)

    def __getitem__(self, name: Any) -> NoReturn:
        raise TypeError(
            f"A Result has attributes, not items, got [{name!r}]. Read result.state, or the values of a "
            'metric: result.latest["train/loss"] is the newest, result.history["train/loss"] are all.'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "A Result cannot be copied or pickled: it holds the run's callbacks and its position in the data. Keep "
            "what you need of it, such as result.state or dict(result.history), or save the run with Checkpoint."
        )

    def __repr__(self) -> str:
        values = [f"{name!r}: {value:.5g}" for name, value in self.latest.items()]
        latest = ", ".join(values[:_SHOWN] + ["..."] * (len(values) > _SHOWN))
        return f"Result(step={self.step}, epoch={self.epoch}, stopped={self.stopped!r}, latest={{{latest}}})"

    def _repr_html_(self) -> str:
        return result_html(self.step, self.epoch, self.stopped, self.latest, self.history)
