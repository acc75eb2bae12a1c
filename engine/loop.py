"""Loop: one run, from its first event to its result."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .cadence import Cadence, Trigger
from .callback import Callback, Carry, find_carry, overridden, reset
from .checks import check_batch, check_reachable, check_rng, check_targets
from .compiled.step import CompiledStep
from .compiled.throttle import Throttle
from .data.batches import Batches
from .data.source import Data
from .data.stacking import last_batch
from .data.stream import BatchStream, WaitInterrupted
from .events import Events, Handler
from .exclusive import exclusive
from .interrupts import deferred_interrupts
from .means import to_float
from .messages import log_user, warn_user
from .metrics import Metrics, Windows
from .placement import Placement, replicated_checksums
from .processes import ProcessGroup, check_same
from .records import History, Latest, Record
from .representation import plain_arguments
from .result import Result
from .snapshot import Snapshot, describe_key, pack, unpack
from .spans import CALL, COMPILE, DATA, WAIT, Observer, Spans
from .storage.checkpoints import Checkpoints
from .trees import (
    Batch,
    State,
    compare_signatures,
    copy_containers,
    difference,
    read_only,
    same_leaves,
    signature,
    weak_leaves,
)
from .version import __version__

MOST_PENDING = 4096
"""The most calls whose metrics stay unread on the device. It bounds their memory in a long window."""


@dataclass(frozen=True)
class Options:
    """The arguments of `Engine` that configure a loop."""

    log_every: int
    in_flight: int
    prefetch: int
    clock: Callable[[], float]


class Loop:
    """State and progress of one run; passed to every event.

    Attributes:
        step: steps completed, counted over all restarts.
        epoch: epochs completed.
        epoch_step: steps completed in the current epoch.
        metrics: the last step's metrics, including what compiled halves logged; still on the device.
        latest: the newest recorded value of every name.
        history: every value recorded by this call of `run`.
        stopped: the reason for the stop that was requested, or None.
        error: the exception that is ending the run, or None.
        steps: the target in steps, or None.
        epochs: the target in epochs, or None.
        start_step: the step at which this call of `run` began: 0, or that of the checkpoint it resumed from.
        rng: the random key of the run, or None.
        callbacks: the callbacks of the run by name, in order.
        checkpoints: where checkpoints of this run are saved; a callback that saves them adds its
            `onstep.storage.Checkpoints` in `on_load`.
        announced: the names that callbacks said they will record.
        mesh: the sharding of batches, or a tree prefix of them with shardings, or None on one device.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}), log_every=2)
    >>> @engine.on("log")
    ... def print_record(loop, record):
    ...     print(loop.step, loop.total, record.values)
    >>> result = engine.run(jnp.int32(0), [1, 3], epochs=1)
    2 2 {'train/loss': 2.0}
    2 2 {'epoch/loss': 2.0}
    """

    def __init__(
        self,
        compiled: CompiledStep,
        callbacks: dict[str, Callback],
        options: Options,
        placement: Placement,
        state: State | Result,
        data: Data,
        *,
        epochs: int | None,
        steps: int | None,
        epoch_steps: int | None,
        rng: jax.Array | None,
        donate: bool,
        handled: dict[str, Callback] | None = None,
    ):
        check_targets(epochs, steps, epoch_steps)
        check_rng(rng, compiled.function.step if compiled.takes_rng else None)
        earlier = state if isinstance(state, Result) else None
        given = earlier.state if earlier else state
        state = placement.place(given, "The state", copy=not (donate or earlier))
        compiled.function.weak = weak_leaves(given)

        self.step: int = 0
        self.epoch: int = 0
        self.epoch_step: int = 0
        self.start_step: int = 0
        self.metrics: Metrics = {}
        self.latest: dict[str, float] = Latest()
        self.history: History = History()
        self.stopped: str | None = None
        self.error: BaseException | None = None
        self.steps: int | None = steps
        self.epochs: int | None = epochs
        # A copy if the state is donated, because a leaf of it may share the key's memory.
        self.rng: Any = placement.key(jnp.copy(rng) if donate and rng is not None else rng)
        self._call_rng = self.rng if compiled.needs_step else None  # folded with the step inside the call
        self.callbacks: dict[str, Callback] = callbacks
        self.checkpoints: list[Checkpoints] = []
        self.announced: set[str] = set()
        self.mesh: Any = placement.batches

        self._compiled, self._placement, self._log_every = compiled, placement, options.log_every
        self._bundle = compiled.bundle(state, compiled.init(state), 0)
        self._stream = BatchStream(data, epoch_steps, placement, options.prefetch, placement.prefetcher(self._bundle))
        self._signature = signature({"state": self.state, "carries": self.carries})
        self._batch: tuple[Batch, int] = (None, 0)  # of the last call; for a block, how many of its batches were used
        self._in_step_begin = False  # whether on_step_begin may replace the batch of the next step
        self._next_batch: list[Batch] = []  # that batch, once a handler has read or replaced it
        self._shown_batch: list[Any] = []  # its leaves as the first handler read them
        self._windows = Windows()
        self._group = ProcessGroup(options.clock)
        self._events = Events(callbacks if handled is None else handled, self._group)
        self._quiet = handled is not None  # a replay, in which most callbacks handle no event
        self._influences: dict[str, set[str]] = {"changed": set(), "recorded": set()}  # callbacks, for a replay
        self._throttle = Throttle(options.in_flight, options.clock, compiled.auto and self._group.count == 1)
        self._spans = Spans()

        self._requested: tuple[str, bool] | None = None  # a stop that the processes have not agreed on yet
        self._final = True  # whether the stop is final
        self._leave_calls = False  # whether _run_steps must return after the call in progress
        self._interrupted = False  # whether it must raise a KeyboardInterrupt then
        self._loading = True
        self._restored = self._saving = self._prepared = False
        self._restored_from = ""  # the directory of the checkpoint, for messages
        self._must_match: dict[str, Any] = {"mode": None, "batch": None}  # what a saved run must share with this one
        self._epoch_done = False  # whether the last step completed its epoch
        self._completed_epoch = 0  # that epoch, 0 if none
        self._earlier = earlier  # the result from which the run resumes, until it has begun
        self._window_reported = earlier is not None  # whether the last window is known to have been recorded
        self._final_snapshot: Snapshot | None = None
        self._failed: str | None = None  # the error that ended the run

    # The loop. Its order is what docs/loop.md promises: do not reorder it.
    #
    # Between the first step and the last, the host waits for the device here:
    #
    # - in the throttle, when too many calls are in flight;
    # - when the means of a window are taken, or MOST_PENDING calls are unread;
    # - in `log`, if a value is on the device, and in `snapshot`, which reads unread metrics;
    # - when batches that are already on a device are stacked, or divided over processes;
    # - with several processes, when `loop.state` is assigned;
    # - in handlers: evaluations, saves, and callbacks that read the state or a carry.
    #
    # A prefetch thread waits for its own transfers. Before the first step, the random key is read, and with several
    # processes the state, to compare and replicate it. tests/test_package.py lists the files that read or wait.

    def iterate(self, when: Cadence | None = None) -> Iterator[Loop]:
        """Run the loop, yielding whenever `when` is due. Every callback that began is guaranteed its `on_run_end`."""
        with (
            exclusive({"This engine": self._compiled, **self.callbacks}),
            self._deferred_interrupts(),
            closing(self._group),
            closing(self._spans),
            self._ensure_end(),  # on_exception, on_run_end: whatever began is ended
        ):
            self._begin()  # on_load, on_run_begin
            trigger = Trigger(when or Cadence(), self._group.clock, self.step)
            with suppress(WaitInterrupted):  # a stop that ended the wait for a batch
                while not self.over:
                    self._begin_epoch()  # on_epoch_begin
                    while self._advance(trigger):  # on_step_begin, then compiled calls and nothing else
                        self._after_step()  # on_step_end, on_log, on_epoch_end
                        if trigger.fires(self.step, self._completed_epoch):
                            yield self
                        self._agree_on_stop()
                        self._save_due()  # on_save
            self._finish()  # on_save, on_snapshot, on_log

    def _begin(self) -> None:
        """Begin the run (on_run_begin), after a saved run has been restored, if there is one (on_load)."""
        for callback in self.callbacks.values():
            if observer := callback.observer(self):
                self.observe(observer)
        self._group.begin(self._step_in_progress)
        self._placement.begin("training")
        self._check_processes()
        reset(self.callbacks)
        earlier, self._earlier = self._earlier, None  # so that its arrays can be freed
        if earlier:
            self.restore(earlier.snapshot)
            self._stream = earlier._stream.resume_as(self._stream)
        self._events.load(self)
        self._loading, self.start_step = False, self.step
        epoch = self.epoch + (self.epoch_step > 0)
        check_reachable(step=self.step, epoch=epoch, steps=self.steps, epochs=self.epochs)
        self._check_epoch_length()
        if self._restored and not self._quiet:
            log_user(self._resume_message())
        self._skip_used()
        self._agree_on_stop()  # with several processes also on the time, before the first deadline is set
        self._compiled.begin(self.step, self._must_match)
        self._events.begin(self)
        self._agree_on_stop()

    def _skip_used(self) -> None:
        """Draw the batches that a resumed run has used, if its data has no other way to continue.

        That must not change what callbacks have restored, such as a random generator from which the data draws.
        """
        if self._stream.must_skip and not self.over:
            kept = self._callback_states()
            self._stream.skip()
            for name, state in kept.items():
                self.callbacks[name].set_state(state)

    def _begin_epoch(self) -> None:
        """Begin an epoch, unless a resumed run continues it, and draw its first batch."""
        self._epoch_done = False
        if self.epoch_step == 0:
            self._events.fire("on_epoch_begin", self)
            self._agree_on_stop()
        if not self.over:
            total = self.total
            self._stream.begin_epoch(self.epoch, math.inf if total is None else total - self.step)

    def _advance(self, trigger: Trigger) -> bool:
        """Run steps up to the next one at which anything is due; return False if the epoch or the run is over instead.

        If data without a length has ended with the last step, only the end of the epoch is due, without another step.
        """
        if self._epoch_done or self.over:
            return False
        if self._data_ended():
            self._epoch_done = True
            return True
        if not self._before_step():
            return False
        self._epoch_done = self._run_steps(trigger)
        return True

    def _data_ended(self) -> bool:
        """Return whether data without a length has ended with the last step. Finding out draws a batch, so it may wait.

        It is asked when all handlers of the last step but those of `on_save` have run, and no stop is requested.
        """
        return self._stream.ended()

    def _before_step(self) -> bool:
        """Call the handlers that are due before the next step, with its batch. Compile before the first step.

        Returns:
            Whether the step will run, because nothing has stopped the run.
        """
        completed_epoch = self.epoch + 1 if self.epoch_step + 1 == self._stream.length else 0
        if due := self._events.take_due("on_step_begin", self.step + 1, completed_epoch):
            self._in_step_begin, self._shown_batch, replaced = True, [], False
            try:
                for handler in due:
                    before = jax.tree.leaves(self._next_batch)
                    handler.call(self)
                    if self._next_batch and not same_leaves(before or self._shown_batch, self._next_batch):
                        self._influences["changed"].add(handler.name)
                        replaced = True
            finally:
                (batch, *_), self._next_batch, self._in_step_begin = self._next_batch or [None], [], False
            self._agree_on_stop()
            if replaced and not self.over:
                self._stream.replace(batch)
        if not self.over:
            self._prepare(self._stream.peek)
        return not self.over

    def _prepare(self, batch: Callable[[], Batch]) -> None:
        """Compile for the first batch, unless that is done."""
        if not self._prepared:
            check_batch(first := batch())
            with self._spans.span(COMPILE):
                self._compiled.prepare(self._bundle, first, self._call_rng)
            self._prepared = True

    def _until_due(self, trigger: Trigger) -> tuple[int, float, float]:
        """Return when anything is next due.

        Returns:
            The number of steps up to the next due one; the step that ends the epoch (infinity if its length is
            unknown); and the time of the next deadline (infinity if there is none).
        """
        step, length = self.step, self._stream.length
        epoch_end = math.inf if length is None else step + length - self.epoch_step
        next_log = (step // self._log_every + 1) * self._log_every
        next_read = step + MOST_PENDING - len(self._windows.pending)
        next_handler = self._events.next(step, epoch_end)
        next_due = min(next_handler, trigger.next_step, next_log, next_read, epoch_end, self.steps or sys.maxsize)
        return int(next_due) - step, epoch_end, min(self._events.deadline(), trigger.deadline)

    def _run_steps(self, trigger: Trigger) -> bool:
        """Run steps up to the next one at which anything is due; return whether that one ends the epoch.

        This is the hot path, so it works with local variables. The plain form costs 0.45 µs more for each step:

            for batch, count in self._stream.take(steps):
                self._bundle, self.metrics = self._compiled.call(self._bundle, batch, self._call_rng, None)
                self.step += count
                self._windows.pending.append(self.metrics)
                self._throttle.wait(self._windows.pending)
        """
        step, bundle, metrics, batch, count = self.step, self._bundle, self.metrics, *self._batch
        compiled, throttle, clock, pending = self._compiled, self._throttle, self._group.clock, self._windows.pending
        several, should_stop = self._group.count > 1, self._group.should_stop
        stream, rng, block_size = self._stream, self._call_rng, self._compiled.block_size
        steps_left, epoch_end, deadline = self._until_due(trigger)
        has_deadline = deadline < math.inf
        wait_at, most_steps = throttle.start(pending), throttle.most_steps(step)
        simple = not (block_size or compiled.conditional)  # one step a call, and every compiled half is due
        call, advance, wait = compiled.call, compiled.advance, throttle.wait
        batches = stream.blocks(steps_left, block_size, most_steps) if block_size else stream.take(steps_left)
        if (spans := self._spans).timed:
            batches, wait = spans.iterate(DATA, batches), spans.wrap(WAIT, wait)
            call, advance = spans.wrap(CALL, call), spans.wrap(CALL, advance)
        try:
            for batch, count in batches:
                if simple:
                    bundle, metrics = call(bundle, batch, rng, None)
                else:
                    completed_epoch = self.epoch + 1 if step + count == epoch_end else 0
                    bundle, metrics = advance(bundle, batch, rng, step, count, completed_epoch)
                step += count
                pending.append(metrics)
                if len(pending) >= wait_at:
                    wait_at = wait(pending)
                if self._leave_calls or (has_deadline and clock() >= deadline) or (several and should_stop()):
                    break  # a signal may have requested a stop
        finally:
            self.epoch_step += step - self.step
            self.step, self._bundle, self.metrics = step, bundle, dict(metrics)
            self._batch = (batch, count if block_size else 0)
        if self._interrupted:
            raise KeyboardInterrupt
        return stream.epoch_done(self.epoch_step)

    def _after_step(self) -> None:
        """Count the epoch, and call the handlers that are due after the step."""
        if self._epoch_done:
            self._stream.end_epoch(not self.over)
            self.epoch, self.epoch_step = self.epoch + 1, 0
        self._completed_epoch = self.epoch if self._epoch_done else 0
        for handler in self._events.take_due("on_step_end", self.step, self._completed_epoch):
            handler.call(self)
        if self.step % self._log_every == 0:
            self.log(self._windows.take_means("train"))
        elif len(self._windows.pending) >= MOST_PENDING:
            self._windows.read()
        if self._epoch_done:
            self.log(self._windows.take_means("epoch"))
            self._events.fire("on_epoch_end", self)

    def _save_due(self) -> None:
        """Save with the handlers that are due, unless the end of the epoch comes first."""
        if self._epoch_done or self.over or not self._data_ended():
            self._save(self._events.take_due("on_save", self.step, self._completed_epoch))

    def _save(self, handlers: list[Handler]) -> None:
        """Call handlers of on_save. Meanwhile `stop` refuses a final stop, because the save would not include it."""
        if self.step == self.start_step or self._quiet:  # a resumed run has only found its epoch complete
            return
        self._saving = True
        try:
            for handler in handlers:
                handler.call(self)
        finally:
            self._saving = False

    def _finish(self) -> None:
        """Save with every handler that has not saved this step, and record the last partial window.

        The record is not in the snapshot, because a later target continues the window. A run that resumes from a
        checkpoint at its target passes it to `on_log` again, because the run before may have been killed between the
        two. It is not part of this session's history.
        """
        if self.step > self.start_step:
            self._save([h for h in self._events.handlers["on_save"] if h.called_at != self.step])
        self._final_snapshot = self.snapshot()
        if self.finished and self.step > self.start_step:
            self.log(self._windows.take_means("train"))
        elif self.finished and not self._window_reported:
            session, self.history = self.history, History()  # also keeps out what handlers log, such as a learning rate
            self.log(self._windows.take_means("train"))
            self.history = session

    def result(self) -> Result:
        """Return how the run ended. After an error, the result is as if a resumable stop had ended the run there.

        Raises:
            RuntimeError: the run has not ended, or its last call failed after its arrays had been donated.
        """
        if self._final_snapshot is None:
            if self._failed is None:
                raise RuntimeError("A run has a result only after its end.")
            self.stopped, self._final = self._failed, False
            self._final_snapshot = self._make_snapshot()
        return Result(
            self.state,
            self.step,
            self.epoch,
            self.stopped,
            self.history,
            self.latest,
            self._final_snapshot,
            self.callbacks,
            self._stream,
        )

    # What callbacks use.

    @property
    def state(self) -> State:
        """The state after the last step. The next step donates it, so copy anything you need after the event.

        You may assign a tree of the same structure, shapes and dtypes. The containers are copies: changing a dict or
        an NNX module in place (`model.eval()`) does not change the run.
        """
        return copy_containers(self._bundle[0])

    @state.setter
    def state(self, new: State) -> None:
        if changed := difference(self.state, new):
            raise ValueError(f"loop.state needs a state like the one it has: {changed}.")
        self._influences["changed"].add(self._events.running[-1] if self._events.running else "")
        self._bundle = (self._placement.place(new, "The state", like=self.state), *self._bundle[1:])

    @property
    def batch(self) -> Batch:
        """The batch of the last step; in `on_step_begin` the next one, which you may replace by assignment.

        There its numpy arrays cannot be changed in place, because they may be yours, and return in the next epoch.
        """
        if self._in_step_begin:
            if not self._next_batch:
                self._next_batch = [read_only(self._stream.peek())]
                self._shown_batch = jax.tree.leaves(self._next_batch)  # to notice a leaf that is assigned
            return self._next_batch[0]
        batch, count = self._batch
        return last_batch(batch, count) if count else batch

    @batch.setter
    def batch(self, new: Batch) -> None:
        if not self._in_step_begin:
            raise RuntimeError(
                "loop.batch can only be replaced in on_step_begin, before its step. Here it is too late."
            )
        self._next_batch = [new]

    def try_step(self) -> tuple[State, dict[str, Carry], Metrics]:
        """Run the next step on copies, with the executable of the run, and return what it gives. Changes nothing.

        Only in `on_step_begin`. Compiled halves with a cadence are not due.

        Returns:
            The state, the carries and the metrics after the step.

        Raises:
            RuntimeError: the run is at another event.
        """
        if not self._in_step_begin:
            raise RuntimeError("loop.try_step can only be called in on_step_begin, where the next batch is known.")
        self._prepare(lambda: self.batch)
        (state, carries, _), metrics = self._compiled.trial(self._bundle, self.batch, self._call_rng)
        return state, carries, dict(metrics)

    @property
    def carries(self) -> dict[str, Carry]:
        """What the compiled halves keep, by the name of the callback; donated like the state."""
        return self._bundle[1]

    def carry(self, callback: Callback) -> Carry:
        """Return the carry of a callback of this run.

        Raises:
            ValueError: the callback is not one of the run's, or has no compiled half.
        """
        return find_carry(self.carries, self.callbacks, callback)

    @property
    def epoch_length(self) -> int | None:
        """Steps in an epoch, None if the data has no length."""
        return self._stream.length

    @property
    def total(self) -> int | None:
        """The step at which the run reaches its target, None if that is unknown."""
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
        """Whether the run has reached its target, or has a final stop."""
        return self._reached or (self.stopped is not None and self._final)

    @property
    def _reached(self) -> bool:
        by_steps = self.steps is not None and self.step >= self.steps
        return by_steps or (self.epochs is not None and self.epoch >= self.epochs)

    @property
    def traced(self) -> Any:
        """One step with the compiled halves, as a `jax.stages.Traced`: its jaxpr and the shapes of its arguments.

        Traced for the first batch of the engine's latest run. None before the engine first compiles its step, and with
        `jit=False`. Until a later run has prepared its first batch, this is what the earlier run traced.
        """
        return self._compiled.traced(self._bundle, self._call_rng)

    def stop(self, reason: str, *, final: bool = True) -> None:
        """End the run once everything that is due at this step is done. If any process asks, all of them stop.

        Args:
            reason: becomes `result.stopped`; the first reason wins.
            final: False for a resumable stop. A run that is resumed after a final stop runs no step.

        Raises:
            RuntimeError: a final stop is requested in `on_save`, too late to be saved.
        """
        if self._quiet and not final:
            return  # the run that is replayed was resumed
        if self._saving and final:
            raise RuntimeError("A final loop.stop is too late in on_save. Call it in on_step_end or on_log.")
        self._requested = self._requested or (reason, final)
        if self._group.count == 1:
            self._agree_on_stop()

    def interrupt(self, reason: str) -> None:
        """Stop, even if the run is waiting for a batch. For signal handlers, in the thread of the run.

        This is a resumable stop. A batch that is being drawn is abandoned: an exception ends the wait inside the code
        of the data, after which everything up to the last complete step is saved. If the run is not waiting, or has
        several processes, this is the same as `loop.stop(reason, final=False)`.

        Args:
            reason: becomes `result.stopped`, as for `stop`.
        """
        self.stop(reason, final=False)
        if self._group.count == 1:  # otherwise the other processes could be waiting for the step of this batch
            self._stream.interrupt()

    def log(self, values: dict[str, Any]) -> None:
        """Record numbers under their full names, and pass them to every `on_log` immediately.

        Args:
            values: scalars by name, such as `{"val/loss": 0.3}`. Blocks until scalars on the device are ready.
        """
        if not isinstance(values, Mapping):
            got = type(values).__name__
            raise TypeError(f'loop.log needs a dict of numbers by name, got {got}: loop.log({{"val/loss": loss}}).')
        record = Record(self.step, self.epoch, {name: to_float(value, name) for name, value in values.items()})
        if record.values:
            if self._events.running:
                self._influences["recorded"].add(self._events.running[-1])
            self.latest.update(record.values)
            self.history.add(record)
            self._events.fire("on_log", self, record)

    def announce(self, names: Iterable[str]) -> None:
        """Say which values a callback will record; call it in `on_run_begin`.

        A callback that watches a name can then warn of a misspelt one before the first step.

        Args:
            names: full names, such as `"val/loss"`.
        """
        self.announced.update(names)

    def observe(self, observer: Observer) -> None:
        """Report the run to an observer until it ends: compiled calls, waits, handlers and progress.

        An observer of the whole run, `on_load` of every callback included, is returned by `Callback.observer`.
        """
        timed = self._spans.timed
        self._spans.add(observer)
        if self._spans.timed and not timed:  # the first observer that overrides begin or end
            self._events.observe(self._spans)
            self._stream.observe(self._spans)
            self._windows.observe(self._spans)

    def progress(self, name: str, done: int, total: int | None = None) -> None:
        """Report the progress of a long task to observers.

        Args:
            name: the task, such as the name of an evaluation.
            done: units done; 0 marks the beginning.
            total: total units, None if unknown.
        """
        self._spans.progress(name, done, total)

    def snapshot(self) -> Snapshot:
        """Return everything the run needs to resume from here, waiting for the device.

        Its arrays are not copies: write or copy them before the event returns.
        """
        self._events.fire("on_snapshot", self)
        return self._make_snapshot()

    def _make_snapshot(self) -> Snapshot:
        host = {
            "rng": describe_key(self.rng),
            "tree": self._signature,
            "carries": list(self.carries),
            "program": self._compiled.describe(),
            "step": self.step,
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "processes": jax.process_count(),
            "data": self._stream.position(),
            "windows": self._windows.get_state(),
            "latest": self.latest,
            "stopped": self.stopped,
            "final": self._final,
            "finished": self.finished,
            "callbacks": self._callback_states(),
            "influences": {how: sorted(names) for how, names in self._influences.items()},
        }
        return Snapshot(self.step, {"state": self.state, "carries": self.carries}, pack(host, "A snapshot"))

    def restore(self, snapshot: Snapshot, *, strict: bool = True, skip: bool = True) -> None:
        """Replace this run with a saved one. Only in `on_load`.

        Args:
            snapshot: the saved run.
            strict: False allows callbacks with a compiled half to be added or removed: a new one starts from scratch,
                and the carry of a removed one is dropped.
            skip: False reads the data from the beginning, for a source without a position, or for other data. The epoch
                begins again, unless `epoch_steps` says where it ends.

        Raises:
            RuntimeError: the run has begun.
            ValueError: the snapshot has a different random key, tree or epoch length; the message shows both sides.
                (A different mode or batch shape is detected later, at the latest with the first batch.)
        """
        if not self._loading:
            raise RuntimeError("loop.restore can only be called in on_load; the run has already begun.")
        host = unpack(snapshot.host)
        if host["rng"] != (key := describe_key(self.rng)):
            raise ValueError(
                f"The saved run has the random key (rng) {host['rng']}, this run {key}. "
                "Pass the same key, or start from scratch."
            )
        state, carries = self._load_tree(snapshot, host, strict)
        self._bundle = self._compiled.bundle(state, carries, host["step"])
        self.step, self.epoch, self.epoch_step = host["step"], host["epoch"], host["epoch_step"]
        self.latest, self._restored = Latest(host["latest"]), True
        self._must_match = host["program"] if skip else host["program"] | {"batch": None}
        self._restored_from = self.checkpoints[-1].directory if self.checkpoints else ""
        if host["final"]:
            self.stopped, self._final = host["stopped"], True
        for how, names in host.get("influences", {}).items():
            self._influences[how].update(names)
        self._windows.set_state(host["windows"])
        if skip:
            _check_loaders(host.get("processes", 1), self._stream.data, host["data"]["loader"])
            self._stream.seek(host["data"])
        elif self._stream.epoch_steps is None or self.epoch_step >= self._stream.epoch_steps:
            self.epoch_step = 0  # the epoch begins again
            self._windows.take_means("epoch")
        keepers = {name: callback for name, callback in self.callbacks.items() if overridden(callback, "set_state")}
        for name, kept in host["callbacks"].items():
            if name in keepers:
                keepers[name].set_state(kept)
            elif kept:
                warn_user(f"The saved run holds the state of {name}, which this run does not have; it is ignored.")

    # Details of the above.

    def _deferred_interrupts(self) -> AbstractContextManager[None]:
        """Raise a KeyboardInterrupt between two calls. An uncompiled step donates nothing, so it need not wait."""
        code = self._run_steps.__code__
        return deferred_interrupts(code, self._interrupt_later) if self._compiled.jit else nullcontext()

    def _interrupt_later(self) -> bool:
        """Ask the hot path to raise a KeyboardInterrupt after its call; return False if it was asked before."""
        if self._interrupted:
            return False
        self._interrupted = self._leave_calls = True
        return True

    @contextmanager
    def _ensure_end(self) -> Iterator[None]:
        """Guarantee the events that end a run, and remember the error that ended it.

        A StopIteration becomes a RuntimeError that says where it was raised. Otherwise Python would replace it with
        "generator raised StopIteration", without its notes.
        """
        try:
            with self._events.ensure_end(self):
                yield
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            if isinstance(error, StopIteration):
                notes = [note.removeprefix("onstep: ") for note in getattr(error, "__notes__", ()) if "onstep:" in note]
                where = "; ".join(notes) or f"raised by the step, or by the body of the `for`, at step {self.step}"
                raise RuntimeError(f"A StopIteration ended the run: {where}.") from None  # contextlib drops the cause
            raise
        finally:
            self._stream.close()  # here, because a run that continues takes over the stream of the earlier run

    def _callback_states(self) -> dict[str, Any]:
        """Return what callbacks keep on the host, by name."""
        return {name: cb.get_state() for name, cb in self.callbacks.items() if overridden(cb, "get_state")}

    def _load_tree(self, snapshot: Snapshot, host: dict[str, Any], strict: bool) -> tuple[State, dict[str, Carry]]:
        """Return the state and the carries of a snapshot, on this run's devices."""
        saved, here, carries = host["tree"], self._signature, dict(self.carries)
        if not strict:
            carries = {name: carry for name, carry in carries.items() if name in host["carries"]}
            changed = tuple(f"carries/{name}/" for name in {*host["carries"], *self.carries} - set(carries))
            saved = {path: kind for path, kind in saved.items() if not f"{path}/".startswith(changed)}
            here = {path: kind for path, kind in here.items() if not f"{path}/".startswith(changed)}
        if changes := compare_signatures(saved, here):
            raise ValueError(f"The saved run does not fit this one (saved, then here): {changes}.")
        like, loads = {"state": self.state, "carries": carries}, callable(snapshot.tree)
        tree = snapshot.tree(like) if loads else snapshot.tree
        tree = {"state": tree["state"], "carries": {name: tree["carries"][name] for name in carries}}
        tree = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
        tree = self._placement.place(tree, "The saved run", copy=not loads, like=like)
        new = {} if strict else self._compiled.init(tree["state"])
        return tree["state"], new | tree["carries"]

    def _step_in_progress(self) -> tuple[int, bool]:
        """Return the number of the step in progress, and whether it ends its epoch, as far as these are known."""
        stream = self._stream
        step = self.step if stream.epoch_steps is not None else self.step - self.epoch_step + stream.used
        return step, self._epoch_done

    def _agree_on_stop(self) -> None:
        """Act on a stop that any process requested. All processes call this at the same steps."""
        if self._group.count > 1:
            self._group.should_stop()
            self._requested = self._group.agree_on_stop(self.step, self._requested)
        if self._requested is not None and self.stopped is None:
            self.stopped, self._final = self._requested
            self._leave_calls = True
        self._requested = None

    def _resume_message(self) -> str:
        epoch = f"epoch {self.epoch}" + ("" if self.epochs is None else f" of {self.epochs}")
        step = f"step {self.step}" + ("" if self.steps is None else f" of {self.steps}")
        if not self.finished:
            return f"resuming from {step} ({epoch})"
        if self.stopped is None:
            found, remedy = f"already at {step} ({epoch})", "raise the target to train further"
        else:
            found = f"the run ended with a final stop at step {self.step} ({self.stopped})"
            remedy = "resume from an earlier checkpoint with Checkpoint(..., resume=step)"
        if not self._restored_from:
            return f"{found}: nothing to do" + ("; raise the target to train further" if self.stopped is None else "")
        again = "start from scratch with Checkpoint(..., overwrite=True)"
        return f"{found}: nothing to do in {self._restored_from}; {remedy}, or {again}"

    def _check_epoch_length(self) -> None:
        """Check cadences in epochs, if the length of epochs is unknown or an epoch may never end.

        Raises:
            ValueError: a handler of `on_step_begin`, or a compiled half, is due by epochs; or data that can be read
                only once is needed for several epochs.
        """
        if self.epochs is not None and self.steps is None and not self.over:
            self._stream.check_epochs(self.epochs - self.epoch)
        if self.epoch_length is not None:
            return
        kind, handlers = type(self._stream.data).__name__, self._events.handlers
        before = {handler.name: handler.trigger for handler in handlers["on_step_begin"]}
        for what, triggers in (("on_step_begin", before), ("update", self._compiled.conditional)):
            for name, trigger in triggers.items():
                if trigger.cadence.epochs:
                    raise ValueError(
                        f"{name}.{what} is due {trigger.cadence}, so the length of an epoch must be known in advance, "
                        f"but a {kind} has no len(). Pass epoch_steps= to run."
                    )
        after = [handler for event in ("on_step_end", "on_save") for handler in handlers[event]]
        waiting = dict.fromkeys(handler.name for handler in after if handler.trigger.cadence.epochs)
        if waiting and self._stream.one_shot and self.steps is not None:
            warn_user(
                f"{', '.join(waiting)} will wait for the end of an epoch, but this run may never complete one: the "
                f"data is a {kind}. Pass epoch_steps= to run, or use a cadence in steps."
            )

    def _check_processes(self) -> None:
        """Raise a ValueError unless all processes have the same configuration: they communicate at the same steps."""
        if self._group.count == 1:
            return
        if self.mesh is None:
            raise ValueError("Several processes need a mesh: Engine(..., mesh=onstep.sharding.make_mesh()).")
        cadences = {name: f"{type(cb).__name__} {cb.when} {cb.update_when}" for name, cb in self.callbacks.items()}
        arguments = {f"the arguments of {name}": plain_arguments(cb) for name, cb in self.callbacks.items()}
        data, checksums = self._stream.data, replicated_checksums(self.state)
        check_same(
            {
                "the list of callbacks": cadences,
                **arguments,
                "the versions of JAX and onstep": [jax.__version__, __version__],
                "log_every": self._log_every,
                "steps_per_call": self._compiled.block_size,
                "the random key (rng)": describe_key(self.rng),
                "the data": repr(data) if isinstance(data, Batches) else type(data).__name__,
                "the target": f"epochs={self.epochs}, steps={self.steps}",
                "the number of batches in an epoch": self.epoch_length,
                "the mesh": str(self.mesh),
                "the tree of the state": self._signature,
                **{f"the checksum of the state at {name}": checksum for name, checksum in checksums.items()},
            }
        )


def _check_loaders(saved: int, data: Data, loader: Any) -> None:
    """Raise a ValueError if loaders would resume at positions saved by a different number of processes."""
    if saved != jax.process_count() and loader is not None and not isinstance(data, Batches):
        raise ValueError(
            f"The position in the data was saved by {saved} process{'es' * (saved > 1)}, but this run has "
            f"{jax.process_count()}, and each loader knows only its own part. Start the same number, or read the data "
            "from the beginning (skip=False)."
        )
