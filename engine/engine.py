"""Engine: the configuration of a loop, for any number of runs."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax
from jax.sharding import Mesh, NamedSharding

from .cadence import Cadence, as_cadence
from .callback import Callback, FunctionCallback, check_when, name_callbacks, reset
from .checks import CheckedCall, check_call, check_int, check_order
from .compiled.function import Step
from .compiled.step import CompiledStep
from .data.source import NO_DATA, Data
from .loop import Loop, Options
from .placement import jit_is_disabled, make_placement
from .plan import Plan, make_plan
from .replay import INTERCEPT, Moment, ReplayedStep, replay_steps
from .representation import call_text
from .result import Result
from .steps import Steps
from .trees import State
from .views import engine_html

P = ParamSpec("P")
T = TypeVar("T")


def _explained(method: Callable[P, T]) -> Callable[P, T]:
    """Explain a call of a method with an unknown argument, or with one by position that needs its name."""

    @functools.wraps(method)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        check_call(method, f"engine.{getattr(method, '__name__', '')}", args[1:], kwargs, {"Engine": Engine.__init__})
        return method(*args, **kwargs)

    return explained


class Engine(CheckedCall):
    """A loop around a pure step, with callbacks between and inside the steps.

    An engine is configuration: call `run` as often as you like, and the step is compiled once.

    Args:
        step: `(state, batch) -> (state, metrics)`. `state` is any pytree of arrays, `metrics` a dict of scalars. A
            third required argument is a random key, different at every step. A third result, a dict, is `aux` for
            the compiled halves of callbacks.
        callbacks: in the order in which they take effect: first the compiled halves, inside the step, then the host
            halves at each event. Only `on_run_end` is called in reverse order.
        log_every: steps between two records of the mean training metrics.
        steps_per_call: maximum number of steps in one compiled call; a call runs fewer if a callback is due earlier.
            "auto" decides from the step and the backend; see docs/performance.md.
        in_flight: maximum number of dispatched but unfinished calls. For calls shorter than 0.1 ms, up to 16 more.
        prefetch: batches that a background thread loads and moves to the device in advance. Meant for accelerators;
            on CPUs it takes time from the steps.
        mesh: the devices to use. Batches are sharded over the axis "data" (or "fsdp", or the only axis); pass a
            NamedSharding to choose, or a tree prefix of a batch with one for each part. The state keeps its sharding,
            or is replicated if it is on one device. See `onstep.sharding`.
        jit: False runs the same loop uncompiled, so that you can step through it in a debugger. `JAX_DISABLE_JIT=1`,
            and a run that begins inside `jax.disable_jit()`, have the same effect, also on evaluation.
        clock: the time in seconds, for cadences in seconds. Tests pass an `onstep.testing.FakeClock`.

    Raises:
        TypeError: `step` is not callable, or a callback has the wrong signature or is not a `Callback`.
        ValueError: two callbacks have the same name, a number is out of range, or a mesh has no axis for batches.

    >>> import jax.numpy as jnp
    >>> def step(w, batch):
    ...     loss, grad = jax.value_and_grad(lambda w: (w - batch) ** 2)(w)
    ...     return w - 0.25 * grad, {"loss": loss}
    >>> engine = Engine(step, log_every=2)
    >>> result = engine.run(jnp.float32(0), [4.0, 4.0, 4.0, 4.0], epochs=1)
    >>> float(result.state), result.history["train/loss"]
    (3.75, [10.0, 0.625])
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
        mesh: Mesh | NamedSharding | Any = None,
        jit: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not callable(step) and callable(callbacks):
            raise TypeError(
                f"Engine takes the step first, then the callbacks, got {type(step).__name__} and "
                f"{type(callbacks).__name__}. Swap them: Engine(step, callbacks)."
            )
        for name, value, least in (("log_every", log_every, 1), ("in_flight", in_flight, 1), ("prefetch", prefetch, 0)):
            check_int("Engine", name, value, least)
        if isinstance(steps_per_call, str) and steps_per_call != "auto":
            raise ValueError(f'Engine needs steps_per_call to be a whole number or "auto", got {steps_per_call!r}.')
        if steps_per_call != "auto":
            check_int("Engine", "steps_per_call", steps_per_call, 1)
        self._callbacks = name_callbacks(callbacks)
        for name, callback in self._callbacks.items():
            check_when(callback, name)
        reset(self._callbacks)
        self._given: dict[str, Any] = {
            "step": step,
            "log_every": log_every,
            "steps_per_call": steps_per_call,
            "in_flight": in_flight,
            "prefetch": prefetch,
            "mesh": mesh,
            "jit": jit,
            "clock": clock,
        }
        self._options = Options(log_every, in_flight, prefetch, clock)
        self._placement = make_placement(mesh)
        self._compiled = self._compile(jit)
        self._replayed: ReplayedStep | None = None  # for replays, which record its calls

    @property
    def callbacks(self) -> dict[str, Callback]:
        """The callbacks by name, in order. It cannot be changed."""
        return self._callbacks

    def on(self, event: str, *, when: Cadence | int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Make the decorated function a callback.

        Args:
            event: the name of the event, with or without `on_`.
            when: as `Callback.when`; only for `step_begin`, `step_end` and `save`.

        Raises:
            TypeError: the function has the wrong arguments for the event, or `engine.on` was used without a name.
            ValueError: there is no such event, or `when` has no effect on it.

        >>> engine = Engine(lambda state, batch: (state + batch, {}))
        >>> @engine.on("epoch_end")
        ... def print_step(loop):
        ...     print("epoch", loop.epoch, "ends at step", loop.step)
        >>> result = engine.run(0, [1, 2, 3], epochs=2)
        epoch 1 ends at step 3
        epoch 2 ends at step 6
        """
        if not isinstance(event, str):
            name = getattr(event, "__name__", repr(event))
            raise TypeError(f'engine.on needs the name of an event: write @engine.on("step_end"), got {name}.')

        def add(function: Callable[..., None]) -> Callable[..., None]:
            added = FunctionCallback(event, function, when)
            self._callbacks = name_callbacks([*self._callbacks.values(), added])
            return function

        return add

    @_explained
    def run(
        self,
        state: State | Result,
        data: Data = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
        donate: bool = False,
    ) -> Result:
        """Run the step over the data until a target is reached or a callback asks for a stop.

        Args:
            state: any pytree of arrays. It is copied, so yours stays valid. Or the Result of an earlier run, to
                continue that run from its end.
            data: an iterable of batches, a callable `epoch -> iterable`, or a loader. Without data, every batch is None
                unless a callback assigns `loop.batch` in `on_step_begin`.
            epochs, steps: the target, counted from the beginning of the first run; whichever is reached first. At
                least one is needed.
            epoch_steps: batches in an epoch, if an epoch is not one pass over the data.
            rng: a random key; each step gets it folded with the number of steps completed before.
            donate: True skips the copy and donates your arrays.

        Raises:
            ValueError: there is no target, or the run is already beyond it; the data is empty or exhausted; there is
                no data, so epochs never end; or the step returns a different tree from the one it received. The
                message says which.

        >>> import jax.numpy as jnp
        >>> engine = Engine(lambda state, batch: (state + batch, {"loss": batch}))
        >>> engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
        Result(step=6, epoch=2, stopped=None, latest={'epoch/loss': 2, 'train/loss': 2})
        """
        loop = self._make_loop(state, data, epochs, steps, epoch_steps, rng, donate)
        for _ in loop.iterate():
            pass
        return loop.result()

    @_explained
    def steps(
        self,
        state: State | Result,
        data: Data = None,
        *,
        when: Cadence | int = 1,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
        donate: bool = False,
    ) -> Steps:
        """Iterate over a run yourself: `with engine.steps(...) as steps: for loop in steps: ...`.

        Args:
            when: when the body of the `for` runs; a plain int means steps.
            state, data, epochs, steps, epoch_steps, rng, donate: as for `run`.

        >>> import jax.numpy as jnp
        >>> engine = Engine(lambda state, batch: (state + batch, {}))
        >>> with engine.steps(jnp.int32(0), range(5), epochs=1, when=2) as steps:
        ...     print([loop.step for loop in steps])
        [2, 4]
        """
        cadence = as_cadence(when, "engine.steps(when=...)")
        return Steps(self._make_loop(state, data, epochs, steps, epoch_steps, rng, donate), cadence)

    @_explained
    def plan(
        self,
        state: State | Result | None = None,
        data: Data | None = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
    ) -> Plan:
        """Return what `run` would do with the same arguments: `print(engine.plan())`.

        Nothing runs, no event fires, nothing is donated or written. Every argument is optional. The more you
        pass, the more the plan shows. With state and data the step is traced for one batch, drawn from a separate
        pass. Data that can be read only once is not touched.

        Args:
            state: as for `run`; gives the sizes of the carries.
            data: as for `run`; gives the length of an epoch and, together with the state, the steps per call.
            epochs, steps, epoch_steps, rng: as for `run`.

        Raises:
            TypeError, ValueError: as `run`, as far as that is known without running.

        >>> plan = Engine(lambda state, batch: (state + batch, {}), log_every=10).plan(0, [1, 2, 3], epochs=4)
        >>> plan.loop[-2:]
        ['ends at step 12', 'keeps at most 2 compiled calls in flight']
        """
        compiled = self._compile(self._jit_now)  # a separate copy, so that planning does not affect this engine
        targets = {"epochs": epochs, "steps": steps, "epoch_steps": epoch_steps}
        return make_plan(compiled, self._callbacks, self._options, self._placement, state, data, targets, rng)

    @overload
    def replay(
        self,
        state: State,
        data: Data,
        directory: str | os.PathLike[str] | None = None,
        *,
        step: int,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
    ) -> Moment: ...

    @overload
    def replay(
        self,
        state: State,
        data: Data,
        directory: str | os.PathLike[str] | None = None,
        *,
        step: range,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
    ) -> Iterator[Moment]: ...

    def replay(
        self,
        state: State,
        data: Data,
        directory: str | os.PathLike[str] | None = None,
        *,
        step: int | range,
        epochs: int | None = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        rng: jax.Array | None = None,
    ) -> Moment | Iterator[Moment]:
        """Return a step of a past run as it was: the state, carries, batch and key that it received.

        The run is continued from the newest intact checkpoint before the step, in its own mode, so the bytes are those
        of the run. Only files of checkpoints are read; nothing is locked, written or moved. Compiled halves run as in
        the run. Of the host halves, only those run that change `loop.state` or `loop.batch`, and with them those that
        record numbers; no callback that only saves, writes or shows handles an event.

        With several processes, all of them call this, and all read the directory.

        Args:
            state, data, epochs, steps, epoch_steps, rng: as for `run`; data that can be read only once has to be new.
                The target may be left out, unless a callback that changes the run depends on it.
            directory: the directory of the run; by default that of the engine's `Checkpoint`. Without checkpoints
                before the step, the run is repeated from its beginning.
            step: the step to reconstruct, counted from 1; or a range of steps, for an iterator over them.

        Raises:
            ValueError: the step is beyond the end of the run, the checkpoint does not fit this engine, or several
                callbacks of the engine save checkpoints and no directory is given.
            RuntimeError: the body of `for loop in engine.steps(...)` changed the state, so the run cannot be repeated
                without it.

        >>> import tempfile
        >>> from onstep.callbacks import Checkpoint
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     engine = Engine(lambda s, b: (s + b, {"loss": b}), [Checkpoint(directory, when=4)])
        ...     _ = engine.run(0, [1, 2, 3, 4, 5], epochs=2)
        ...     moment = engine.replay(0, [1, 2, 3, 4, 5], step=7, epochs=2)
        >>> int(moment.state), int(moment.batch), moment.checkpoint
        (16, 2, 4)
        >>> after, metrics, aux = moment.run()
        >>> int(after)
        18
        """
        wanted = step if isinstance(step, range) else range(check_int("engine.replay", "step", step, 1), step + 1)
        if not wanted or wanted.start < 1 or wanted.step != 1:
            raise ValueError(f"engine.replay needs a step, or a range of steps >= 1 without gaps, got {step!r}.")
        compiled = self._replayed
        if compiled is None or compiled.jit != self._jit_now:
            compiled = self._replayed = self._compile(self._jit_now, ReplayedStep)
        moments = replay_steps(
            compiled,
            self._callbacks,
            self._options,
            self._placement,
            state,
            data,
            directory,
            wanted,
            {"epochs": epochs, "steps": steps, "epoch_steps": epoch_steps},
            rng,
        )
        if isinstance(step, range):
            return moments
        (moment,) = moments
        return moment

    @classmethod
    def _check_call(cls, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        check_call(cls.__init__, cls.__name__, given, named, {"engine.run": Engine.run})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle an engine as the call that made it. Its compiled step is not part of a copy."""
        return _from_call, ({**self._given, "callbacks": list(self._callbacks.values())},)

    def __repr__(self) -> str:
        return call_text(Engine, {**self._given, "callbacks": list(self._callbacks.values())})

    def _repr_html_(self) -> str:
        return engine_html(call_text(Engine, self._given), {name: repr(each) for name, each in self._callbacks.items()})

    @property
    def _jit_now(self) -> bool:
        """Whether a run that begins now is compiled: JAX_DISABLE_JIT and `jax.disable_jit()` act as `jit=False`."""
        return self._given["jit"] and not jit_is_disabled()

    def _compile(self, jit: bool, kind: type[CompiledStep] = CompiledStep) -> Any:
        given: dict[str, Any] = {name: self._given[name] for name in ("step", "steps_per_call")}
        return kind(callbacks=self._callbacks, placement=self._placement, jit=jit, **given)

    def _make_loop(
        self,
        state: State | Result,
        data: Data,
        epochs: int | None,
        steps: int | None,
        epoch_steps: int | None,
        rng: jax.Array | None,
        donate: bool,
    ) -> Loop:
        if intercept := INTERCEPT.get():
            targets = {"epochs": epochs, "steps": steps, "epoch_steps": epoch_steps}
            intercept(self, {"state": state, "data": data, "rng": rng, **targets})
        check_order(state, data)
        if data is None and epochs is not None and epoch_steps is None:
            raise ValueError(
                "A run without data needs the length of an epoch to reach epochs=. Pass epoch_steps=, use steps= "
                "instead, or pass the data."
            )
        return Loop(
            self._compiled if self._jit_now == self._given["jit"] else self._compile(self._jit_now),
            self._callbacks,
            self._options,
            self._placement,
            state,
            NO_DATA if data is None else data,
            epochs=epochs,
            steps=steps,
            epoch_steps=epoch_steps,
            rng=rng,
            donate=donate,
        )


def _from_call(given: dict[str, Any]) -> Engine:
    return Engine(**given)
