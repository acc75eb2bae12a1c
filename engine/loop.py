"""Loop: where a run stands, and what every event is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .blocks import last
from .callback import Callback, Carry
from .events import Events
from .feed import Feed
from .means import to_float
from .metrics import Meter, Metrics
from .pace import Pace
from .processes import Peers
from .records import History, Record
from .restore import put_back, take
from .result import Result, carry_of
from .snapshot import Snapshot
from .spans import Observer, Spans
from .trees import Batch, State, difference, place, signature

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

    from .compiled import Program


class Loop:
    """Where a run stands. Every event is given the loop.

    Attributes:
        step: steps completed, absolute across restarts.
        epoch: epochs completed.
        epoch_step: steps completed in the present epoch.
        metrics: what the last step returned, on the device, with what pure halves logged.
        latest: the newest value of every name that was recorded.
        history: every value recorded by this run.
        stopped: the reason of the stop that was asked for, or None.
        error: what is ending the run, or None.
        steps: the target in steps, or None.
        epochs: the target in epochs, or None.
        rng: the run's random key, or None.
        callbacks: the run's callbacks by name, in order.
        mesh: the engine's, or None.
    """

    def __init__(self, program: Program, callbacks: dict[str, Callback], feed: Feed, state: State, rng: Any, **to: Any):
        self.step = self.epoch = self.epoch_step = 0
        self.metrics: Metrics = {}
        self._batch: tuple[Batch, int] = (None, 0)  # the last call's, and how many of it ran where it is a block
        self.latest: dict[str, float] = {}
        self.history: History = History()
        self.stopped: str | None = None
        self.error: BaseException | None = None
        self.steps: int | None = to["steps"]
        self.epochs: int | None = to["epochs"]
        self.rng: Any = rng
        self.callbacks: dict[str, Callback] = callbacks
        self._program, self._feed = program, feed
        self.mesh: NamedSharding | None = None if program.spread is None else program.spread.batches
        self._events: Events
        self._pace: Pace
        self._peers: Peers
        self._asked: tuple[str, bool] | None = None  # a stop, which the processes have not agreed on yet
        self._bundle = program.bundle(state, program.init(state), 0)
        self._signature = signature({"state": self.state, "carries": self.carries})
        self._meter = Meter()
        self._final = True  # whether a stop is
        self._loading = True
        self._restored = self._saving = False
        self._saved: dict[str, Any] = {"mode": None, "batch": None}  # of a saved run: what it must share
        self._prepared = False  # whether the step is compiled for the run's batches
        self._began = 0  # the step at which this call of run began
        self._last: Snapshot  # the run at its end
        self._spans = Spans()
        self.checkpoints: list[Any] = []  # onstep.storage: where this run's checkpoints are

    @property
    def state(self) -> State:
        """The state after the last step. The next step donates it: copy what must outlive the
        event. May be assigned a tree of the same structure, shapes and dtypes.
        """
        return self._bundle[0]

    @state.setter
    def state(self, new: State) -> None:
        if changed := difference(self.state, new):
            raise ValueError(f"loop.state needs a state like the one it has: {changed}.")
        self._bundle = (place(new, "The state", spread=self._program.spread, like=self.state), *self._bundle[1:])

    @property
    def batch(self) -> Batch:
        """The last step's batch; in `on_step_begin` the next one, which may be assigned."""
        batch, rows = self._batch
        return last(batch, rows) if rows else batch

    @batch.setter
    def batch(self, new: Batch) -> None:
        self._batch = new, 0

    @property
    def carries(self) -> dict[str, Carry]:
        """What the pure halves keep, by the callback's name; donated like the state."""
        return self._bundle[1]

    def carry(self, callback: Callback) -> Carry:
        """The carry of a callback of this run."""
        return carry_of(self.carries, self.callbacks, callback)

    @property
    def first_step(self) -> int:
        """The step at which this call of `run` began: 0, or that of the checkpoint it resumed from."""
        return self._began

    @property
    def traced(self) -> Any:
        """One step with the compiled halves, traced for the run's first batch (`jax.stages.Traced`), or None."""
        return self._program.traced(self._bundle, self.rng)

    def observe(self, observer: Observer) -> None:
        """Tell `observer` what the run does from now on, until it ends."""
        before = bool(self._spans)
        self._spans.add(observer)
        if self._spans and not before:  # the first that overrides begin or end
            self._events.observe(self._spans)
            self._feed.observe(self._spans)
            self._meter.observe(self._spans)

    def progress(self, name: str, done: int, total: int | None = None) -> None:
        """Report how far a long task of a callback is; `done=0` marks its beginning."""
        self._spans.progress(name, done, total)

    @property
    def epoch_length(self) -> int | None:
        """Steps in an epoch, None if the data cannot tell."""
        return self._feed.length

    @property
    def total(self) -> int | None:
        """The step at which the run reaches its target, None if that is not known."""
        left = None
        if self.epochs is not None and self.epoch_length is not None:
            left = self.step - self.epoch_step + (self.epochs - self.epoch) * self.epoch_length
        return min((n for n in (self.steps, left) if n is not None), default=None)

    @property
    def over(self) -> bool:
        """Whether no further step will run."""
        return self.stopped is not None or self._reached

    @property
    def finished(self) -> bool:
        """Whether the run is over for good: at its target, or by a final stop."""
        return self._reached or (self.stopped is not None and self._final)

    @property
    def _reached(self) -> bool:
        by_steps = self.steps is not None and self.step >= self.steps
        return by_steps or (self.epochs is not None and self.epoch >= self.epochs)

    def stop(self, reason: str, *, final: bool = True) -> None:
        """Ends the run once everything due at this step is done: in all processes, if one asks for it.

        Args:
            reason: what `result.stopped` will say; the first one given stands.
            final: False for a stop that is meant to be resumed; after a final one a later
                resume runs no step.

        Raises:
            RuntimeError: a final stop is asked for in `on_save`, too late to be saved.
        """
        if self._saving and final:
            raise RuntimeError("A final loop.stop is too late in on_save. Ask for it in on_step_end or on_log.")
        self._asked = self._asked or (reason, final)
        if self._peers.count == 1:
            self._agree()

    def _under_way(self) -> int:
        """The number of the step that was begun last, where the data cannot tell how many there are; else 0."""
        return self.step - self.epoch_step + self._feed._used if self._feed.length is None else 0

    def _agree(self) -> None:
        """Takes what somebody asked for; all processes come here at the same steps."""
        if self._peers.count > 1:
            self._asked = self._peers.stand(self.step, self._asked)
        if self._asked is not None and self.stopped is None:
            self.stopped, self._final = self._asked
        self._asked = None

    def log(self, values: dict[str, Any]) -> None:
        """Records numbers under their whole names and hands them to every `on_log`, now.

        Args:
            values: scalars by name, such as `{"val/loss": 0.3}`; device scalars are waited for.
        """
        record = Record(self.step, self.epoch, {name: to_float(value, name) for name, value in values.items()})
        if record.values:
            self.latest.update(record.values)
            self.history.add(record)
            self._events.fire("on_log", self, record)

    def snapshot(self) -> Snapshot:
        """Everything the run needs to go on from here; waits for the device.

        The arrays in it are the live ones: write or copy them before the event returns.
        """
        self._events.fire("on_snapshot", self)
        return take(self)

    def restore(self, snapshot: Snapshot, *, strict: bool = True, skip: bool = True) -> None:
        """Puts a saved run in the place of this one; in `on_load` alone.

        Args:
            snapshot: the saved run.
            strict: False lets pure halves come and go: one that is new begins afresh, the carry
                of one that went is left.
            skip: False reads the data from their beginning, for a source without a position.

        Raises:
            RuntimeError: the run has begun.
            ValueError: the snapshot is of another random key, tree or length of epochs; the message
                has both sides. (Another execution mode, or batches of another shape, are found when
                the first batch is there.)
        """
        if not self._loading:
            raise RuntimeError("loop.restore belongs in on_load: the run has begun.")
        put_back(self, snapshot, strict, skip)

    def _result(self) -> Result:
        now = (self.state, self.step, self.epoch, self.stopped, self.history, self.latest)
        return Result(*now, self._last, self.callbacks, self._feed)
