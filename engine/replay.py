"""Replay: any step of a past run, reconstructed from the checkpoints of the run."""

from __future__ import annotations

import functools
import os
import pdb
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cadence import at
from .callback import Callback, Carry, overridden
from .compiled.step import CompiledStep
from .data.source import NO_DATA, Data
from .data.stacking import last_batch
from .first_bad import BadOperation, first_bad
from .loop import Loop, Options
from .metrics import Metrics
from .placement import Placement, fold_in, to_host
from .snapshot import Snapshot, unpack
from .storage.checkpoints import Checkpoints
from .trees import Batch, State, copy_containers, copy_numpy, named_leaves

INTERCEPT: ContextVar[Callable[[Any, dict[str, Any]], None] | None] = ContextVar("INTERCEPT", default=None)
"""Called with the engine and the arguments instead of a run: how `python -m onstep replay` replays a script's run."""


@dataclass(frozen=True)
class Moment:
    """One step of a past run, about to be taken again. Made by `engine.replay`.

    Attributes:
        step: the number of the step, counted from 1.
        checkpoint: the step of the checkpoint from which it was reconstructed, None for the initial state.
        state: what the step received.
        carries: what the compiled halves of callbacks received, by name.
        batch: the batch that the step received.
        rng: the random key that the step received, None without one.
    """

    step: int
    checkpoint: int | None
    state: State
    carries: dict[str, Carry]
    batch: Batch
    rng: Any
    _compiled: ReplayedStep = field(repr=False)
    _call: _Call = field(repr=False)

    def run(self, *, jit: bool = True) -> tuple[State, Metrics, dict[str, Any]]:
        """Run the step again.

        Args:
            jit: True makes the call that the run made, so the results are the same bytes. False runs the same code
                uncompiled, so that you can print, or stop in a debugger.

        Returns:
            The state and the metrics after the step, with what compiled halves made of them; and the `aux` of the
            step, from a separate call.
        """
        state, metrics = self._compiled.repeat(self._call, jit=jit)
        return state, metrics, self._compiled.aux(self.state, self.batch, self.rng, jit=jit)

    def first_bad(self) -> BadOperation | None:
        """Return the operation that first produced a NaN or an infinity in the step, None if all results are finite.

        The step and the compiled halves run one operation at a time. The results can differ from those of the compiled
        step in the last bits, so an uncompiled step may be finite where the compiled one was not.
        """
        (state, carries, count), batch, rng, due = self._compiled.single(self._call)
        rest = {"count": count, "rng": rng, "due": due}
        given = {"state": state, "carries": carries, "batch": batch, "rest": rest}

        def step(given: dict[str, Any]) -> Any:
            bundle = given["state"], given["carries"], given["rest"]["count"]
            return self._compiled.one_step(bundle, given["batch"], given["rest"]["rng"], given["rest"]["due"])

        return first_bad(step, given)

    def checksums(self) -> dict[str, int]:
        """Return a checksum of every leaf of the state, the carries and the batch, by name: CRC-32."""
        trees = {"batch": self.batch, "carries": self.carries, "state": self.state}
        return {name: _checksum(leaf) for name, leaf in named_leaves(trees).items()}

    def debug(self) -> None:
        """Run the uncompiled step in pdb, Python's debugger, which stops at its first line."""
        rng = [self.rng] if self._compiled.takes_rng else []
        with jax.disable_jit():
            pdb.runcall(self._compiled.function.step, *copy_containers((self.state, self.batch)), *rng)

    def bad_results(self) -> list[str]:
        """Return the names of the metrics, and of the leaves of the state, that are not finite after the step."""
        state, metrics = self._compiled.repeat(self._call, jit=True)
        leaves = named_leaves(dict(metrics)) | {f"state/{name}": leaf for name, leaf in named_leaves(state).items()}
        floats = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        return [name for name, leaf in floats.items() if not bool(jnp.isfinite(leaf).all())]


@dataclass(frozen=True)
class _Call:
    """The arguments of a compiled call."""

    bundle: Any
    batch: Batch
    rng: Any
    due: Any


class ReplayedStep(CompiledStep):
    """A compiled step that can record the arguments of its next call."""

    recording: bool = False
    recorded: _Call | None = None
    _inner: Any = None

    @property
    def call(self) -> Any:
        """The compiled call; while `recording` is set, it records its arguments."""
        return self._record if self.recording else self._inner

    @call.setter
    def call(self, inner: Any) -> None:
        self._inner = inner

    def _record(self, bundle: Any, batch: Batch, rng: Any, due: Any) -> Any:
        self.recorded, self.recording = _Call(_copy(bundle), copy_numpy(batch), rng, due), False
        return self._inner(bundle, batch, rng, due)

    def single(self, call: _Call) -> tuple[Any, ...]:
        """Return the arguments of one step: the bundle, the batch, the run's key, and the halves that are due."""
        if not self.block_size:
            return call.bundle, call.batch, call.rng, call.due
        mask, _ = call.due
        return call.bundle, last_batch(call.batch, 1), call.rng, None if mask is None else mask[0]

    def one_step(self, bundle: Any, batch: Batch, rng: Any, due: Any) -> Any:
        """Run one step; to be traced or run without compilation."""
        (state, carries, _), metrics = self.function(bundle, batch, rng, due)
        return dict(self._logged(metrics, due)), state, carries

    def repeat(self, call: _Call, *, jit: bool) -> tuple[State, Metrics]:
        """Return the state and the metrics after a recorded call."""
        single = self.single(call)
        if not jit:
            with jax.disable_jit():
                metrics, state, _ = self.one_step(*single)
            return state, metrics
        bundle, metrics = self._inner(_copy(call.bundle), call.batch, call.rng, call.due)
        return bundle[0], dict(self._logged(metrics[0] if self.block_size else metrics, single[-1]))

    def aux(self, state: State, batch: Batch, rng: Any, *, jit: bool) -> dict[str, Any]:
        """Return the third result of the user's step, {} if it has none."""
        step = jax.jit(self.function.step) if jit else self.function.step
        results = step(*copy_containers((state, batch)), *([rng] if self.takes_rng else []))
        return results[2] if len(results) == 3 else {}

    def _logged(self, metrics: Metrics, due: Any) -> Metrics:
        """Return the metrics without those of compiled halves that are not due."""
        if due is None or isinstance(due, jax.core.Tracer):
            return metrics
        skipped = [half for half, now in zip(self.conditional, np.asarray(due), strict=True) if not now]
        absent = {name for half in skipped for name in self.function.logged[half]}
        return {name: value for name, value in metrics.items() if name not in absent}


class _Capture(Callback):
    """Restores the run, and records the steps that are replayed."""

    def __init__(self, steps: range, snapshot: Snapshot | None, compiled: ReplayedStep):
        self._snapshot, self._compiled = snapshot, compiled
        self.when = at(*steps)
        self.found: dict[str, Any] = {}

    def on_load(self, loop: Loop) -> None:
        if self._snapshot is not None:
            loop.restore(self._snapshot)

    def on_step_begin(self, loop: Loop) -> None:
        self.found = {
            "step": loop.step + 1,
            "state": _copy(loop.state),
            "carries": _copy(loop.carries),
            "batch": copy_numpy(loop.batch),
            "rng": None if loop.rng is None else fold_in(loop.rng, loop.step),
        }
        self._compiled.recording = True


def _checksum(leaf: Any) -> int:
    typed = jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)
    return zlib.crc32(np.ascontiguousarray(to_host(jax.random.key_data(leaf) if typed else leaf)).tobytes())


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def find_start(checkpoints: Checkpoints, step: int) -> Snapshot | None:
    """Return the newest intact checkpoint from which a step can be replayed; None for the initial state."""
    for saved in reversed([number for number in checkpoints.steps() if number < step]):
        if checkpoints.damage(saved) is None:
            return Snapshot(saved, functools.partial(checkpoints.load, saved), checkpoints.host(saved))
    return None


def changing_callbacks(
    callbacks: dict[str, Callback], checkpoints: Checkpoints | None, start: Snapshot | None, step: int
) -> list[str]:
    """Return the names of the callbacks whose host half takes part in a replay: those that changed state or batches.

    If one of them did, so do those that recorded numbers, because the first may read them. Checkpoints say which they
    are. If none was saved after the step, any callback that handles `on_step_begin` could have changed a batch.

    Raises:
        RuntimeError: the body of a `for` over the run changed the state.
    """
    changed, recorded = set[str](), set[str]()
    hosts, later = [] if start is None else [start.host], None
    if checkpoints is not None:
        later = next((n for n in checkpoints.steps() if n >= step and checkpoints.damage(n) is None), None)
        hosts += [] if later is None else [checkpoints.host(later)]
    for host in hosts:
        known = unpack(host).get("influences", {})  # version 0.1 did not save it
        changed.update(known.get("changed", ()))
        recorded.update(known.get("recorded", ()))
    if later is None:
        changed.update(name for name, callback in callbacks.items() if overridden(callback, "on_step_begin"))
    if "" in changed:
        raise RuntimeError(
            "engine.replay cannot repeat a run whose state was changed in the body of `for loop in engine.steps(...)`. "
            "Change it in a callback instead."
        )
    names = changed | recorded if changed else changed
    return [name for name in callbacks if name in names]


def replay_steps(
    compiled: ReplayedStep,
    callbacks: dict[str, Callback],
    options: Options,
    placement: Placement,
    state: State,
    data: Data,
    directory: str | os.PathLike[str] | None,
    steps: range,
    targets: dict[str, int | None],
    rng: jax.Array | None,
) -> Iterator[Moment]:
    """Run from the newest checkpoint before the first of some steps, and yield each of them as it was."""
    last = targets["steps"]
    if last is not None and steps[-1] > last:
        raise ValueError(f"engine.replay needs a step of the run, got {steps[-1]}; the run ends at step {last}.")
    checkpoints = None if directory is None else Checkpoints(directory)
    start = None if checkpoints is None else find_start(checkpoints, steps[0])
    names = changing_callbacks(callbacks, checkpoints, start, steps[-1])
    capture = _Capture(steps, start, compiled)
    loop = Loop(
        compiled,
        callbacks,
        options,
        placement,
        state,
        NO_DATA if data is None else data,
        **targets | {"steps": steps[-1]},
        rng=rng,
        donate=False,
        handled={name: callbacks[name] for name in names} | {"engine.replay": capture},
    )
    for _ in loop.iterate(capture.when):
        yield Moment(
            **capture.found,
            checkpoint=None if start is None else start.step,
            _compiled=compiled,
            _call=compiled.recorded,
        )
    if loop.step < steps[-1]:
        raise ValueError(f"engine.replay needs a step of the run, got {steps[-1]}; the run ended at step {loop.step}.")


def replay_command(loop: Loop, step: int) -> str:
    """Return what the user can type to replay a step of a run, for the message of an error.

    That is a command if the run is part of a script, and a call of `engine.replay` in a notebook.

    Args:
        loop: the run.
        step: the step, counted from 1.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> _ = engine.on("step_end")(lambda loop: print(replay_command(loop, loop.step)))
    >>> _ = engine.run(0, [1], epochs=1)
    ... replay... 1...
    """
    directory = loop.checkpoints[0].directory if loop.checkpoints else None
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or "ipykernel" in sys.modules:
        return f"engine.replay(state, data, {directory!r}, step={step}, ...).first_bad()"
    here = os.path.relpath(script)
    where = [] if directory is None else ["--run", os.path.relpath(directory)]
    parts = ["python", "-m", "onstep", "replay", "--step", str(step), *where, here, *sys.argv[1:]]
    return shlex.join(parts)
