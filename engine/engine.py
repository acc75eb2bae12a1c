"""Engine: the step, the callbacks, the options, and the loop itself."""

from __future__ import annotations

import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .cadence import Cadence, as_cadence
from .callback import Callback, Function
from .compiled import Program, Step
from .events import Due, Events
from .feed import Data, Feed
from .loop import Loop, Result
from .notice import notice
from .trees import State, place


class Engine:
    """A loop around a pure step, with callbacks between and inside the steps.

    Args:
        step: `(state, batch) -> (state, metrics)`. A third required argument is a random key of
            the step's own; a third result, a dict, is `aux` for the callbacks' pure halves.
        callbacks: in the order in which their effects shall happen.
        log_every: steps between two means of the training metrics.
        in_flight: compiled calls that may be queued; 1 waits for each before the next but one.
        jit: False runs the same loop uncompiled, to look inside the step.

    Raises:
        TypeError: the step or a callback has the wrong arguments or is none.
        ValueError: two callbacks of one name, or a number out of range.
    """

    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        step: Step,
        callbacks: Iterable[Callback] = (),
        *,
        log_every: int = 50,
        in_flight: int = 2,
        jit: bool = True,
    ):
        self._log_every = _whole("log_every", log_every, 1)
        self._in_flight = _whole("in_flight", in_flight, 1)
        self._callbacks = _named(list(callbacks))
        for callback in self._callbacks.values():
            callback._reset()
        self._program = Program(step, self._callbacks, jit)

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
            self._callbacks = _named([*self._callbacks.values(), Function(event, function, when)])
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
        loop = self._prepare(state, data, epochs, steps, epoch_steps, rng, donate)
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
        loop = self._prepare(state, data, epochs, steps, epoch_steps, rng, donate)
        return Steps(loop, self._turns(loop, as_cadence(when, "engine.steps(when=...)")))

    def _turns(self, loop: Loop, when: Cadence | None) -> Iterator[Loop]:
        """The loop. Gives a turn at the due points of `when`; whatever begins here ends here."""
        try:
            self._begin(loop)
            turn = Due(when or Cadence(), self._clock)
            turn.start(loop.step)
            while not loop.over:
                self._begin_epoch(loop)
                ended = False
                while not (ended or loop.over):
                    self._before_step(loop)
                    if loop.over:
                        break
                    ended = self._advance(loop, turn)
                    self._after_step(loop, ended)
                    if turn.now(loop.step, loop.epoch if ended else 0):
                        yield loop
            self._finish(loop)
        except BaseException as error:
            loop.error = error
            loop._events.fail(loop, error)
            raise
        finally:
            loop._events.end(loop)

    def _begin(self, loop: Loop) -> None:
        """on_load, in which a saved run may take the place of this one; then on_run_begin."""
        loop._events.load(loop)
        loop._loading, loop._began = False, loop.step
        _check_target(loop)
        self._check_epochs(loop)
        self._program.start(loop.step)
        loop._events.begin(loop)

    def _begin_epoch(self, loop: Loop) -> None:
        """on_epoch_begin, unless an epoch goes on; then its first batch is drawn."""
        if loop.epoch_step == 0:
            loop._events.fire("on_epoch_begin", loop)
        if not loop.over:
            loop._feed.begin_epoch(loop.epoch)
            if loop.batch is None:
                self._program.expect(loop._feed.peek())

    def _before_step(self, loop: Loop) -> None:
        """on_step_begin of those who are due at the next step, with its batch."""
        completes = loop.epoch + 1 if loop.epoch_step + 1 == loop.epoch_length else 0
        if due := loop._events.due("on_step_begin", loop.step + 1, completes):
            loop.batch = loop._feed.peek()
            for answer in due:
                answer.call(loop)
            loop._feed.replace(loop.batch)

    def _advance(self, loop: Loop, turn: Due) -> bool:
        """Runs steps up to the next one that is due; returns whether it ends the epoch."""
        step, bundle, metrics, batch = loop.step, loop._bundle, loop.metrics, loop.batch
        program, rng, clock, pending, queue = self._program, loop.rng, self._clock, loop._meter.pending, self._in_flight
        end = math.inf if loop.epoch_length is None else step + loop.epoch_length - loop.epoch_step
        log = (step // self._log_every + 1) * self._log_every
        until = min(loop._events.next(), turn.next, log, end, sys.maxsize if loop.steps is None else loop.steps)
        deadline = min(loop._events.deadline(), turn.deadline)
        call, timed = program.call, deadline < math.inf
        try:
            for batch in loop._feed.take(int(until) - step):
                if program.at_times:
                    completes = loop.epoch + 1 if step + 1 == end else 0
                    bundle, metrics = program.branched(bundle, batch, rng, step + 1, completes)
                else:
                    bundle, metrics = call(bundle, batch, rng, None)
                step += 1
                pending.append(metrics)
                if len(pending) > queue:
                    program.wait(pending[~queue])
                if timed and clock() >= deadline:
                    break
        finally:
            loop.epoch_step += step - loop.step
            loop.step, loop._bundle, loop.metrics, loop.batch = step, bundle, metrics, batch
        return loop._feed.ended(loop.epoch_step)

    def _after_step(self, loop: Loop, ended: bool) -> None:
        """The host stop: on_step_end, on_log, on_epoch_end, on_save of those who are due."""
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
        for answer in loop._events.due("on_save", loop.step, completes):
            answer.call(loop)

    def _finish(self, loop: Loop) -> None:
        """on_save for those who have not saved this step; then the last partial window."""
        ran = loop.step > loop._began
        for answer in loop._events.answers["on_save"] if ran else ():
            if answer.called_at != loop.step:
                answer.call(loop)
        loop._last = loop.snapshot()
        if ran and loop.finished:
            loop.log(loop._meter.close("train"))

    def _check_epochs(self, loop: Loop) -> None:
        """Cadences in epochs, where epochs are not known before they end, or may never end."""
        begins = {answer.name: answer.due for answer in loop._events.answers["on_step_begin"]}
        for what, dues in (("on_step_begin", begins), ("update", self._program.at_times)):
            for name, due in dues.items():
                if due.cadence.epochs and loop.epoch_length is None:
                    raise ValueError(
                        f"{name}.{what} is due {due.cadence}, which must be known before a step, but "
                        f"{type(loop._feed.data).__name__} has no len. Give run epoch_steps=."
                    )
        if loop.epoch_length is None and loop._feed.one_shot and loop.steps is not None:
            ends = [answer for event in ("on_step_end", "on_save") for answer in loop._events.answers[event]]
            if waiting := dict.fromkeys(answer.name for answer in ends if answer.due.cadence.epochs):
                warnings.warn(
                    f"{', '.join(waiting)} wait for the end of an epoch, which may never come: the data is a "
                    f"{type(loop._feed.data).__name__}. Give run epoch_steps=, or a cadence in steps.",
                    stacklevel=2,
                )

    def _prepare(
        self,
        state: State | Result,
        data: Data,
        epochs: int | None,
        steps: int | None,
        epoch_steps: int | None,
        rng: jax.Array | None,
        donate: bool,
    ) -> Loop:
        if epochs is None and steps is None:
            raise ValueError("A run needs a target: epochs=, steps= or both.")
        for name, target in (("epochs", epochs), ("steps", steps)):
            _whole(name, 0 if target is None else target, 0)
        if epoch_steps is not None:
            _whole("epoch_steps", epoch_steps, 1)
        if self._program.rng and rng is None:
            raise ValueError("The step takes a random key as its third argument. Pass one: rng=jax.random.key(0).")
        _check_key(rng)
        for callback in self._callbacks.values():
            callback._reset()
        before = state if isinstance(state, Result) else None
        start = before.state if before else place(state, "The state", copy=not donate)
        events, feed = Events(self._callbacks, self._clock), Feed(data, epoch_steps)
        loop = Loop(self._program, self._callbacks, events, feed, start, rng, steps, epochs)
        if before:
            loop.restore(before.snapshot)
            loop._feed = before._feed.again(feed)
        return loop


class Steps:
    """The loop as a `for` of one's own: a turn at each due point.

    Leaving the `with` early, by `break` say, is a stop that can be resumed; an error raised in
    it ends the run like one of a callback.

    Attributes:
        result: the Result, once the `with` is left.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> with engine.steps(jnp.int32(0), range(5), epochs=1, when=2) as steps:
    ...     print([int(loop.state) for loop in steps])
    [1, 6]
    """

    def __init__(self, loop: Loop, turns: Iterator[Loop]):
        self._loop, self._turns, self._open = loop, turns, False
        self.result: Result | None = None

    def __enter__(self) -> Steps:
        self._open = True
        return self

    def __iter__(self) -> Iterator[Loop]:
        if not self._open:
            raise RuntimeError("engine.steps needs a with: `with engine.steps(...) as steps: for loop in steps: ...`.")
        return self._turns

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._open = False
        if error is not None:
            try:
                self._turns.throw(error)  # type: ignore[attr-defined]
            except BaseException as raised:
                if raised is not error:
                    raise
            return
        if not self._loop.over:
            self._loop.stop("the for was left early", final=False)
        for _ in self._turns:
            pass
        self.result = self._loop._result()


def _named(callbacks: list[Callback]) -> dict[str, Callback]:
    """The callbacks by name: their own, or the class name, numbered where it is repeated.

    Raises:
        TypeError: something is no callback.
        ValueError: a name or a callback occurs twice.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            call = f" Did you mean {callback.__name__}(...)?" if isinstance(callback, type) else ""
            raise TypeError(f"An engine needs callbacks, got {callback!r:.80}.{call}")
    given = [callback.name for callback in callbacks if callback.name is not None]
    names: dict[str, Callback] = {}
    for callback in callbacks:
        if any(callback is known for known in names.values()) or given.count(callback.name) > 1:
            who = callback.name or type(callback).__name__
            raise ValueError(f"Two callbacks are named {who!r}, or one is listed twice. Give each a name of its own.")
        plain = type(callback).__name__
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in itertools.count(1))
        name = callback.name or next(n for n in numbered if n not in names and n not in given)
        names[name] = callback
    return names


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} needs a whole number >= {least}, got {value!r}.")
    return value


def _check_key(rng: Any) -> None:
    kind = getattr(rng, "dtype", None)
    if rng is not None and not (kind == jnp.uint32 or (kind and jnp.issubdtype(kind, jax.dtypes.prng_key))):
        raise TypeError(f"rng needs a random key such as jax.random.key(0), got {rng!r:.80}.")


def _check_target(loop: Loop) -> None:
    """Says where a run that goes on stands; raises ValueError where that is beyond its target."""
    targets = {"step": (loop.step, loop.steps), "epoch": (loop.epoch + (loop.epoch_step > 0), loop.epochs)}
    for unit, (at, target) in targets.items():
        if target is not None and at > target:
            raise ValueError(f"The saved run is at {unit} {at}, beyond the target of {target} {unit}s.")
    if loop._restored:
        of = ", ".join(f"{unit} {at} of {target}" for unit, (at, target) in targets.items() if target is not None)
        if loop.stopped is not None:
            notice(f"the run was stopped for good at step {loop.step} ({loop.stopped}): nothing to do")
        else:
            notice(f"already at {of}: nothing to do" if loop.over else f"going on after step {loop.step} ({of})")
