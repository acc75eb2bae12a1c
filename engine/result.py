"""Result: how a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from .callback import Callback, Carry
from .feed import Feed
from .records import History
from .snapshot import Snapshot
from .trees import State


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        state: the last state, the caller's to keep.
        step: steps completed.
        epoch: epochs completed.
        stopped: the reason of `loop.stop`, None if the run reached its target.
        history: what this call of run recorded.
        latest: the newest value of every name.
        snapshot: the run at its end; hand the Result to `run` as its state to go on.
    """

    state: State
    step: int
    epoch: int
    stopped: str | None
    history: History
    latest: dict[str, float]
    snapshot: Snapshot = field(repr=False)
    _callbacks: dict[str, Callback] = field(repr=False)
    _feed: Feed = field(repr=False)

    def carry(self, callback: Callback) -> Carry:
        """The carry of a callback of the run."""
        return carry_of(self.snapshot.tree["carries"], self._callbacks, callback)


def carry_of(carries: dict[str, Carry], callbacks: dict[str, Callback], callback: Callback) -> Carry:
    """The carry of a callback, among those of a run by name."""
    name = next((name for name, known in callbacks.items() if known is callback), None)
    if name is None:
        raise ValueError(f"This {type(callback).__name__} is not among the run's callbacks {list(callbacks)}.")
    if name not in carries:
        raise ValueError(f"{name} keeps no carry: it has no update.")
    return carries[name]
