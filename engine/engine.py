"""Engine: the step, the callbacks, the options, and the loop itself."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding

from . import checks
from .cadence import Cadence, as_cadence
from .callback import Callback, Function
from .compiled import Program, Step
from .events import Answer, Due, Events
from .feed import Feed
from .loop import Loop
from .notice import notice, standing
from .pace import Pace
from .plan import plan as _plan
from .processes import Peers
from .result import Result
from .sharding import Spread
from .source import Data
from .spans import CALL, COMPILE, DATA, WAIT
from .steps import Steps
from .trees import State, home, place


class Engine:
    """A loop around a pure step, with callbacks between and inside the steps.

    Args:
        step: `(state, batch) -> (state, metrics)`. A third required argument is a random key of
            the step's own; a third result, a dict, is `aux` for the callbacks' pure halves.
        callbacks: in the order in which their effects shall happen.
        log_every: steps between two means of the training metrics.
        steps_per_call: the most steps that one compiled call runs; fewer where a callback is due
            before. "auto" decides from the step and the backend; see docs/performance.md.
        in_flight: compiled calls that may be queued; 1 waits for each before the next but one.
            Calls shorter than 0.1 ms may be sixteen more.
        prefetch: batches that a thread draws and puts on the device ahead of their use; for
            accelerators, as on CPUs it takes time from the steps.
        mesh: of many devices: batches are cut along its axis "data" (or "fsdp", or the only one; a
            NamedSharding says how else), the state stays as it lies, or is put whole on every
            device. See `onstep.sharding`.
        jit: False runs the same loop uncompiled, to look inside the step.
        clock: the time in seconds, for cadences in seconds; tests pass `onstep.testing.FakeClock()`.

    Raises:
        TypeError: the step or a callback has the wrong arguments or is none.
        ValueError: two callbacks of one name, a number out of range, or a mesh without an axis for batches.
    """

    def __init__(
        self,
        step: Step,
        callbacks: Iterable[Callback] = (),
        *,
        log_every: int = 50,
        steps_per_call: int | Literal["auto"] = "auto",
        in_flight: int = 2,
        prefetch: int = 0,
        mesh: Mesh | NamedSharding | None = None,
        jit: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._log_every = checks.whole("Engine", "log_every", log_every, 1)
        self._in_flight = checks.whole("Engine", "in_flight", in_flight, 1)
        self._prefetch = checks.whole("Engine", "prefetch", prefetch, 0)
        if steps_per_call != "auto":
            checks.whole("Engine", "steps_per_call", steps_per_call, 1)
        self._callbacks = checks.named(callbacks, Callback)
        for callback in self._callbacks.values():
            callback._reset()
        self._program = Program(step, self._callbacks, steps_per_call, jit, None if mesh is None else Spread(mesh))

    @property
    def callbacks(self) -> dict[str, Callback]:
        """The callbacks by name, in order."""
        return dict(self._callbacks)

    def on(self, event: str, *, when: Cadence | int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Makes the decorated function a callback: `@engine.on("epoch_end")`.

        Args:
            event: the event's name, with or without `on_`.
            when: as `Callback.when`.
        """

        def add(function: Callable[..., None]) -> Callable[..., None]:
            added = Function(event, function, when)
            self._callbacks = checks.named([*self._callbacks.values(), added], Callback)
            return function

        return add

    def run(
        self,
        state: State | Result,
        data: Data,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
        donate: bool = False,
    ) -> Result:
        """Runs the step over the data until a target is reached or a callback asks for a stop.

        Args:
            state: any pytree of arrays; it is copied, so the caller's stays valid. Or the Result
                of an earlier run, to go on from its end.
            data: an iterable of batches, a callable `epoch -> iterable`, or a loader.
            epochs, steps: absolute targets; whichever comes first. At least one is needed.
            epoch_steps: batches that make an epoch, where it is not one pass over the data.
            rng: a random key; each step gets it folded with the steps completed before.
            donate: True spares the copy: the caller's state is used up.

        Raises:
            ValueError: no target, one below the step the run stands at, empty or exhausted data,
                or a step that returns another tree than it got; the message says which.
        """
        loop = self._prepare(state, data, rng, donate, epochs=epochs, steps=steps, epoch_steps=epoch_steps)
        for _ in self._turns(loop, None):
            pass
        return loop._result()

    def steps(
        self,
        state: State | Result,
        data: Data,
        *,
        when: Cadence | int = 1,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
        donate: bool = False,
    ) -> Steps:
        """The same loop for those who want to own the `for`; see `Steps`. Arguments as for `run`.

        Args:
            when: a turn of the `for` comes at each due point of this.
        """
        loop = self._prepare(state, data, rng, donate, epochs=epochs, steps=steps, epoch_steps=epoch_steps)
        return Steps(loop, self._turns(loop, as_cadence(when, "engine.steps(when=...)")))

    plan = _plan  # what a run would do: nothing runs

    def _turns(self, loop: Loop, when: Cadence | None) -> Iterator[Loop]:
        """The loop. Gives a turn at the due points of `when`; whatever begins here ends here."""
        try:
            self._begin(loop)
            turn = Due(when or Cadence(), loop._peers.clock, loop.step)
            while not loop.over:
                self._begin_epoch(loop)
                ended = False
                while not (ended or loop.over):
                    self._before_step(loop)
                    if loop.over:
                        break
                    ended = self._advance(loop, turn)
                    completes = self._after_step(loop, ended)
                    if turn.now(loop.step, completes):
                        yield loop
                    loop._agree()
                    self._save(loop, loop._events.due("on_save", loop.step, completes))
            self._finish(loop)
        except BaseException as error:
            loop.error = error
            loop._events.fail(loop, error)
            raise
        finally:
            try:
                loop._events.end(loop)
            finally:
                loop._spans.close()
                loop._feed.close()
                loop._peers.close()
                loop.error = None  # its traceback holds the loop, and so everything

    def _begin(self, loop: Loop) -> None:
        """on_load, in which a saved run may take the place of this one; then on_run_begin."""
        loop._peers.begin(loop._under_way)
        checks.same_everywhere(loop, self._log_every)
        loop._events.load(loop)
        loop._loading, loop._began = False, loop.step
        checks.reachable(loop)
        checks.epochs_known(loop._events, loop._feed, self._program.at_times, steps=loop.steps)
        if loop._restored:
            notice(standing(loop))
        self._program.start(loop.step, loop._saved)
        loop._events.begin(loop)
        loop._agree()

    def _begin_epoch(self, loop: Loop) -> None:
        """on_epoch_begin, unless an epoch goes on; then its first batch is drawn."""
        if loop.epoch_step == 0:
            loop._events.fire("on_epoch_begin", loop)
            loop._agree()
        if not loop.over:
            loop._feed.begin_epoch(loop.epoch)

    def _before_step(self, loop: Loop) -> None:
        """on_step_begin of those who are due at the next step, with its batch; the first is compiled for."""
        completes = loop.epoch + 1 if loop.epoch_step + 1 == loop.epoch_length else 0
        if due := loop._events.due("on_step_begin", loop.step + 1, completes):
            loop.batch = loop._feed.peek()
            for answer in due:
                answer.call(loop)
            loop._agree()
            if not loop.over:
                loop._feed.replace(loop.batch)
        if not (loop._prepared or loop.over):
            with loop._spans.span(COMPILE):
                self._program.prepare(loop._bundle, loop._feed.peek(), loop.rng if self._program.counted else None)
            loop._prepared = True

    def _advance(self, loop: Loop, turn: Due) -> bool:
        """Runs steps up to the next one that is due; returns whether it ends the epoch."""
        step, bundle, metrics, batch, count = loop.step, loop._bundle, loop.metrics, *loop._batch
        program, clock, pending = self._program, loop._peers.clock, loop._meter.pending
        feed, rng = loop._feed, loop.rng if program.counted else None
        length, log = feed.length, (step // self._log_every + 1) * self._log_every
        end = math.inf if length is None else step + length - loop.epoch_step
        until = min(loop._events.next(step, end), turn.next, log, end, loop.steps or sys.maxsize)
        deadline = min(loop._events.deadline(), turn.deadline)
        call, wait, timed, steps = program.call, loop._pace.wait, deadline < math.inf, int(until) - step
        advance = program.advance
        plain = not (program.rows or program.at_times)
        full, most = loop._pace.start(pending), loop._pace.steps(step)
        batches = feed.blocks(steps, program.rows, most) if program.rows else feed.take(steps)
        if spans := loop._spans:
            batches, wait = spans.iterate(DATA, batches), spans.wrap(WAIT, wait)
            call, advance = spans.wrap(CALL, call), spans.wrap(CALL, advance)
        try:
            for batch, count in batches:
                if plain:
                    bundle, metrics = call(bundle, batch, rng, None)
                else:
                    completes = loop.epoch + 1 if step + count == end else 0
                    bundle, metrics = advance(bundle, batch, rng, step, count, completes)
                step += count
                pending.append(metrics)
                if len(pending) >= full:
                    full = wait(pending)
                if loop.stopped is not None or (timed and clock() >= deadline):  # a signal may stop it
                    break
        finally:
            loop.epoch_step += step - loop.step
            loop.step, loop._bundle, loop.metrics = step, bundle, dict(metrics)
            loop._batch = batch, count if program.rows else 0
        return feed.ended(loop.epoch_step)

    def _after_step(self, loop: Loop, ended: bool) -> int:
        """on_step_end, on_log and on_epoch_end; returns the epoch that was completed, or 0."""
        if ended:
            loop.epoch, loop.epoch_step = loop.epoch + 1, 0
            loop._feed.end_epoch()
        completes = loop.epoch if ended else 0
        for answer in loop._events.due("on_step_end", loop.step, completes):
            answer.call(loop)
        if loop.step % self._log_every == 0:
            loop.log(loop._meter.close("train"))
        if ended:
            loop.log(loop._meter.close("epoch"))
            loop._events.fire("on_epoch_end", loop)
        return completes

    def _save(self, loop: Loop, answers: list[Answer]) -> None:
        """on_save; too late for a stop for good, which would be missing from what is saved."""
        loop._saving = True
        for answer in answers:
            answer.call(loop)
        loop._saving = False

    def _finish(self, loop: Loop) -> None:
        """on_save for those who have not saved this step; then the last partial window."""
        ran = loop.step > loop._began
        if ran:
            self._save(loop, [a for a in loop._events.answers["on_save"] if a.called_at != loop.step])
        loop._last = loop.snapshot()
        if ran and loop.finished:
            loop.log(loop._meter.close("train"))

    def _prepare(self, state: State | Result, data: Data, rng: Any, donate: bool, **to: int | None) -> Loop:
        checks.targets(**to)
        checks.random_key(rng, needed=self._program.takes_rng)
        for callback in self._callbacks.values():
            callback._reset()
        before = state if isinstance(state, Result) else None
        spread = self._program.spread
        start = place(before.state if before else state, "The state", copy=not (donate or before), spread=spread)
        rng = rng if spread is None or rng is None else spread.settle(rng)
        feed = Feed(data, to["epoch_steps"], self._prefetch, spread or home(start))
        loop = Loop(self._program, self._callbacks, feed, start, rng, **to)
        peers = loop._peers = Peers(self._clock)
        loop._events = Events(self._callbacks, peers.clock)
        loop._pace = Pace(self._in_flight, self._clock, self._program.auto and peers.count == 1)
        if before:
            loop.restore(before.snapshot)
            loop._feed = before._feed.again(feed)
        return loop
