"""Replay: any step of a past run, reconstructed from the checkpoints of the run."""

from __future__ import annotations

import copy
import functools
import os
import pdb
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cadence import Cadence, at
from .callback import Callback, Carry, overridden
from .compiled.step import CompiledStep
from .data.source import NO_DATA, Data
from .data.stacking import last_batch
from .first_bad import BadOperation, first_bad
from .influences import find_influences
from .loop import Loop, Options
from .metrics import Metrics
from .placement import Placement, fold_in, to_host
from .processes import first
from .snapshot import Snapshot, pack, unpack
from .storage.checkpoints import Checkpoints
from .trees import Batch, State, as_array, copy_containers, copy_numpy, named_leaves

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
        batch: the batch that the step received; with several processes, the part of this one.
        rng: the random key that the step received, None without one.
    """

    step: int
    checkpoint: int | None
    state: State
    carries: dict[str, Carry]
    batch: Batch
    rng: Any
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
        state, metrics = self._call.repeat() if jit else self._call.run_uncompiled()
        return state, metrics, self._call.aux(self.rng, jit=jit)

    def first_bad(self) -> BadOperation | None:
        """Return the operation that first produced a NaN or an infinity in the step, None if all results are finite.

        The step and the compiled halves run one operation at a time. The results can differ from those of the compiled
        step in the last bits, so an uncompiled step may be finite where the compiled one was not.
        """
        with self._call.context():
            return first_bad(self._call.step, self._call.arguments())

    def checksums(self) -> dict[str, int]:
        """Return a checksum of every leaf of the state, the carries, the batch and the key, by name: CRC-32."""
        trees = {"batch": self.batch, "carries": self.carries, "rng": self.rng, "state": self.state}
        return {name: _checksum(leaf) for name, leaf in named_leaves(trees).items()}

    def debug(self) -> None:
        """Run the uncompiled step in pdb, Python's debugger, which stops at its first line."""
        with jax.disable_jit(), self._call.context():
            pdb.runcall(*self._call.users_step(self.rng))

    def bad_results(self) -> list[str]:
        """Return the names of the metrics, and of the leaves of the state, that are not finite after the step."""
        state, metrics = self._call.repeat()
        leaves = named_leaves(dict(metrics)) | {f"state/{name}": leaf for name, leaf in named_leaves(state).items()}
        floats = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        return [name for name, leaf in floats.items() if not bool(jnp.isfinite(leaf).all())]


@dataclass(frozen=True)
class _Call:
    """A compiled call that a replay made, with copies of its arguments.

    Attributes:
        compiled: the step of which it is a call.
        call: the call.
        in_block: whether it takes stacked batches, of which it ran the first.
        bundle, batch, rng, due: its arguments.
    """

    compiled: ReplayedStep
    call: Callable[..., Any]
    in_block: bool
    bundle: Any
    batch: Batch
    rng: Any
    due: Any

    @property
    def context(self) -> Callable[[], Any]:
        """The context in which to call what is compiled, or not compiled, for a mesh."""
        return self.compiled.placement.context

    def repeat(self) -> tuple[State, Metrics]:
        """Return the state and the metrics after the call."""
        (state, *_), metrics = self.call(_copy(self.bundle), self.batch, self.rng, self.due)
        return state, self._logged(metrics[0] if self.in_block else metrics)

    def run_uncompiled(self) -> tuple[State, Metrics]:
        """Return the state and the metrics after the same step, uncompiled."""
        with jax.disable_jit(), self.context():
            metrics, state, _ = self.step(self.arguments())
        return state, metrics

    def arguments(self) -> dict[str, Any]:
        """Return what the step takes, by name, with the batch on the devices."""
        state, carries, count = self.bundle
        mask = self.due[0] if self.in_block else self.due
        due = mask[0] if self.in_block and mask is not None else mask
        batch = last_batch(self.batch, 1) if self.in_block else self.batch
        batch = jax.tree.map(as_array, self.compiled.placement.place_batch(batch))
        rest = {"count": count, "due": due, "rng": self.rng}
        return {"batch": batch, "carries": carries, "rest": rest, "state": state}

    def step(self, given: dict[str, Any]) -> tuple[Metrics, State, dict[str, Carry]]:
        """Run the step with `arguments`; to be traced, or run without compilation."""
        rest = given["rest"]
        bundle = given["state"], given["carries"], rest["count"]
        (state, carries, _), metrics = self.compiled.function(bundle, given["batch"], rest["rng"], rest["due"])
        return self._logged(metrics), state, carries

    def users_step(self, rng: Any) -> tuple[Any, ...]:
        """Return the user's step and its arguments."""
        given = self.arguments()
        key = (rng,) if self.compiled.takes_rng else ()
        return self.compiled.function.step, *copy_containers((given["state"], given["batch"])), *key

    def aux(self, rng: Any, *, jit: bool) -> dict[str, Any]:
        """Return the third result of the user's step, {} if it has none."""
        step, *arguments = self.users_step(rng)
        with self.context():
            if not jit:
                with jax.disable_jit():
                    return (*step(*arguments), {})[2]
            has_aux = len(jax.eval_shape(step, *arguments)) == 3
            return self.compiled.aux(*arguments) if has_aux else {}

    def _logged(self, metrics: Metrics) -> Metrics:
        """Return the metrics without those of compiled halves that were not due."""
        due = self.due[0] if self.in_block else self.due
        if due is None:
            return dict(metrics)
        flags = np.asarray(due)[0] if self.in_block else np.asarray(due)
        function = self.compiled.function
        skipped = [half for half, now in zip(function.conditional, flags, strict=True) if not now]
        absent = {name for half in skipped for name in function.logged[half]}
        return {name: value for name, value in metrics.items() if name not in absent}


class ReplayedStep(CompiledStep):
    """A compiled step that can record its next call.

    Attributes:
        recording: whether to record the next call.
        recorded: the last call that was recorded.
    """

    recording: bool = False
    recorded: Any = None
    _inner: Any = None

    @property
    def call(self) -> Any:
        """The compiled call; while `recording` is set, it records itself."""
        return self._record if self.recording else self._inner

    @call.setter
    def call(self, inner: Any) -> None:
        self._inner = inner

    def _record(self, bundle: Any, batch: Batch, rng: Any, due: Any) -> Any:
        arguments = _copy(bundle), copy_numpy(batch), rng, due
        self.recorded, self.recording = _Call(self, self._inner, bool(self.block_size), *arguments), False
        return self._inner(bundle, batch, rng, due)

    @functools.cached_property
    def aux(self) -> Callable[..., dict[str, Any]]:
        """The user's step, compiled for its third result."""
        return jax.jit(lambda *arguments: self.function.step(*arguments)[2])


class _Capture(Callback):
    """Restores a run and keeps what its steps receive. The last callback of a replay."""

    def __init__(self, when: Cadence, start: Snapshot | None, compiled: ReplayedStep):
        self._start, self._compiled = start, compiled
        self.when: Cadence | int = when
        self.found: dict[str, Any] = {}

    def on_load(self, loop: Loop) -> None:
        if self._start is not None:
            loop.restore(self._start)
            self._state = _copy(loop.state)

    def on_run_begin(self, loop: Loop) -> None:
        """Undo what other callbacks have changed: the run did not begin at this checkpoint."""
        if self._start is not None:
            loop.state = self._state
            set_states(loop.callbacks, unpack(self._start.host)["callbacks"])

    def on_step_begin(self, loop: Loop) -> None:
        self.found = {
            "step": loop.step + 1,
            "state": _copy(loop.state),
            "carries": _copy(loop.carries),
            "batch": copy_numpy(loop.batch),
            "rng": None if loop.rng is None else fold_in(loop.rng, loop.step),
        }
        self._compiled.recording = True


def set_states(callbacks: dict[str, Callback], states: dict[str, Any]) -> None:
    """Give callbacks what their `get_state` returned, by name."""
    for name, state in states.items():
        if name in callbacks and overridden(callbacks[name], "set_state"):
            callbacks[name].set_state(state)


def _checksum(leaf: Any) -> int:
    typed = jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)
    return zlib.crc32(np.ascontiguousarray(to_host(jax.random.key_data(leaf) if typed else leaf)).tobytes())


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@contextmanager
def _untouched(callbacks: dict[str, Callback], data: Data) -> Iterator[None]:
    """Give callbacks back the host state that they had, and an iterator with a state its position."""
    kept = {name: each.get_state() for name, each in callbacks.items() if overridden(each, "get_state")}
    kept = unpack(pack(kept, "get_state"))  # a copy
    moves = hasattr(data, "__next__") and hasattr(data, "get_state") and hasattr(data, "set_state")
    position = copy.deepcopy(data.get_state()) if moves else None
    try:
        yield
    finally:
        set_states(callbacks, kept)
        if moves:
            data.set_state(position)


def find_checkpoints(callbacks: dict[str, Callback]) -> Checkpoints | None:
    """Return the checkpoints of a run whose directory was not given: those that its callback saves.

    Raises:
        ValueError: several callbacks save checkpoints.
    """
    found = {name: each.checkpoints for name, each in callbacks.items() if each.checkpoints is not None}
    if len(found) > 1:
        directories = ", ".join(f"{each.directory} ({name})" for name, each in found.items())
        raise ValueError(f"engine.replay needs one of the directories of this engine: {directories}. Pass it.")
    return next(iter(found.values()), None)


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
    total = targets["steps"]
    if total is not None and steps[-1] > total:
        raise ValueError(f"engine.replay needs a step of the run, got {steps[-1]}; the run ends at step {total}.")
    if total is targets["epochs"] is None:
        targets = targets | {"steps": steps[-1]}
    checkpoints = find_checkpoints(callbacks) if directory is None else Checkpoints(directory)
    before, after, start, hosts = None, None, None, list[dict[str, Any]]()
    if checkpoints is not None:
        before, after = first(_surround, checkpoints, steps)
        if before is not None:
            start = Snapshot(before, functools.partial(checkpoints.load, before), checkpoints.host(before))
        elif after is not None and (origin := _origin(checkpoints, after)):
            raise ValueError(
                f"engine.replay needs a step after the first checkpoint of this run, which began at {origin}."
            )
        hosts = [unpack(checkpoints.host(step)) for step in (before, after) if step is not None]
    known = [host["influences"] for host in hosts if "influences" in host]  # version 0.1 did not save it
    complete = after is not None and "influences" in hosts[-1]
    due = at(*steps)
    capture = _Capture(due, start, compiled)
    handled = find_influences(callbacks, known, complete=complete) | {"engine.replay": capture}
    with _untouched(callbacks, data):
        loop = Loop(
            compiled,
            callbacks,
            options,
            placement,
            state,
            NO_DATA if data is None else data,
            **targets,
            rng=rng,
            donate=False,
            handled=handled,
        )
        for _ in loop.iterate(due):
            yield Moment(**capture.found, checkpoint=before, _call=compiled.recorded)
            if loop.step == steps[-1]:
                loop.stop("replayed")
    if loop.step < steps[-1]:
        raise ValueError(f"engine.replay needs a step of the run, got {steps[-1]}; the run ended at step {loop.step}.")


def _origin(checkpoints: Checkpoints, step: int) -> str | None:
    """Return the checkpoint of another run from which a run started, if there is one."""
    return (checkpoints.manifest(step).get("config") or {}).get("start")


def _surround(checkpoints: Checkpoints, steps: range) -> tuple[int | None, int | None]:
    """Return the newest intact checkpoint before some steps, and the oldest after them; None if there is none."""
    saved = checkpoints.steps()
    before = (step for step in reversed(saved) if step < steps[0] and checkpoints.damage(step) is None)
    after = (step for step in saved if step >= steps[-1] and checkpoints.damage(step) is None)
    return next(before, None), next(after, None)


def replay_command(loop: Loop, step: int) -> str:
    """Return what the user can type to replay a step of a run, for the message of an error.

    That is a command if the run is part of a script, and a call of `engine.replay` in a notebook.

    Args:
        loop: the run.
        step: the step, counted from 1.

    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> _ = engine.on("step_end")(lambda loop: print("replay" in replay_command(loop, loop.step)))
    >>> _ = engine.run(0, [1], epochs=1)
    True
    """
    directory = loop.checkpoints[0].directory if loop.checkpoints else None
    script = getattr(sys.modules["__main__"], "__file__", None)
    ipython = sys.modules.get("IPython")
    if script is None or (ipython is not None and ipython.get_ipython() is not None):
        which = f"{directory!r}, " if len(loop.checkpoints) > 1 else ""
        return f"engine.replay(state, data, {which}step={step}, ...).first_bad()"
    here = os.path.relpath(script)
    where = [] if directory is None else ["--run", os.path.relpath(directory)]
    parts = ["python", "-m", "onstep", "replay", "--step", str(step), *where, here, *sys.argv[1:]]
    return shlex.join(parts)
