"""Helpers for testing callbacks, steps and data sources without real models, files or waiting.

>>> import jax.numpy as jnp
>>> from onstep import Engine
>>> transcript = Transcript(quiet=("load", "epoch_begin", "epoch_end", "log", "snapshot"))
>>> engine = Engine(counting_step, [StopAt(2), transcript])
>>> engine.run(jnp.int32(0), [10, 20, 30], epochs=1).stopped
'StopAt(2)'
>>> transcript.lines
['run_begin 0/0', 'step_begin 0/0', 'step_end 1/0', 'save 1/0', 'step_begin 1/0', 'step_end 2/0', 'save 2/0',
 'run_end 2/0']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cadence import Cadence, at
from .callback import BY_CADENCE, EVENTS, Callback
from .checks import check_int, did_you_mean
from .loop import Loop
from .records import Record
from .result import Result
from .snapshot import Snapshot

__all__ = [
    "FakeClock",
    "FakeLoader",
    "FakeLoaderIterator",
    "LogValues",
    "RaiseIn",
    "Restore",
    "SizedData",
    "StopAt",
    "TickingBatches",
    "Transcript",
    "counting_step",
    "same_bytes",
]


def counting_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Add the batch to the state, and return the batch as the loss.

    Its results are exact integers or floats that you can work out by hand, and it runs in microseconds.

    >>> counting_step(1, 2)
    (3, {'loss': 2})
    """
    return state + batch, {"loss": batch}


class Transcript(Callback):
    """Records each event as a line, so that a test can compare the order of events with one list.

    A line is `"<event> <step>/<epoch>"`, with the transcript's name in front if it has one, and followed by the text
    that `show` returns. A line of `log` also has the values of the record, sorted by name, and one of `exception` the
    type of the error.

    Args:
        name: the callback's name. With one, several transcripts can share `lines`.
        lines: the list to append to; a new one by default.
        quiet: events to leave out, without `on_`. They are ignored entirely, so they do not end blocks of
            steps.
        show: `(loop, event) -> str`, appended to each line; an empty string appends nothing.
        when: when `step_begin`, `step_end` and `save` are due; a plain int means steps.

    Attributes:
        lines: the lines written so far.

    >>> from onstep import Engine
    >>> transcript = Transcript(quiet=[event for event in EVENT_NAMES if event != "step_end"])
    >>> _ = Engine(counting_step, [transcript]).run(jnp.int32(0), [1, 2], epochs=2)
    >>> transcript.lines
    ['step_end 1/0', 'step_end 2/1', 'step_end 3/1', 'step_end 4/2']
    >>> transcript.steps("step_end")
    [1, 2, 3, 4]
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        lines: list[str] | None = None,
        quiet: Iterable[str] = (),
        show: Callable[[Loop, str], str] | None = None,
        when: Cadence | int = 1,
    ):
        self.name: str | None = name
        self.lines: list[str] = [] if lines is None else lines
        self.when: Cadence | int = when
        self._show = show
        quiet = set(quiet)
        if unknown := sorted(quiet - set(EVENT_NAMES)):
            raise ValueError(f"Transcript cannot leave out {unknown}. The events are {list(EVENT_NAMES)}.")
        for event in quiet:  # the empty method of Callback counts as not overridden
            setattr(self, f"on_{event}", getattr(super(), f"on_{event}"))

    def steps(self, event: str) -> list[int]:
        """Return the steps at which an event (without `on_`) was recorded.

        Args:
            event: one of `EVENT_NAMES`.
        """
        start = f"{self.name} {event} " if self.name else f"{event} "
        return [int(line.removeprefix(start).split("/")[0]) for line in self.lines if line.startswith(start)]

    def on_load(self, loop: Loop) -> None:
        self._write(loop, "load")

    def on_run_begin(self, loop: Loop) -> None:
        self._write(loop, "run_begin")

    def on_epoch_begin(self, loop: Loop) -> None:
        self._write(loop, "epoch_begin")

    def on_step_begin(self, loop: Loop) -> None:
        self._write(loop, "step_begin")

    def on_step_end(self, loop: Loop) -> None:
        self._write(loop, "step_end")

    def on_log(self, loop: Loop, record: Record) -> None:
        self._write(loop, "log", *(f"{name}={value:g}" for name, value in sorted(record.values.items())))

    def on_epoch_end(self, loop: Loop) -> None:
        self._write(loop, "epoch_end")

    def on_save(self, loop: Loop) -> None:
        self._write(loop, "save")

    def on_snapshot(self, loop: Loop) -> None:
        self._write(loop, "snapshot")

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        self._write(loop, "exception", type(error).__name__)

    def on_run_end(self, loop: Loop) -> None:
        self._write(loop, "run_end")

    def _write(self, loop: Loop, event: str, *more: str) -> None:
        shown = self._show(loop, event) if self._show else ""
        self.lines.append(" ".join(filter(None, [self.name, event, f"{loop.step}/{loop.epoch}", shown, *more])))


EVENT_NAMES: tuple[str, ...] = tuple(event.removeprefix("on_") for event in EVENTS)
"""The names of the events as `Transcript` writes them, without `on_`."""


class StopAt(Callback):
    """Requests a stop at the end of a step.

    Args:
        step: the step, counted from 1.
        final: False for a resumable stop.
        reason: the value of `result.stopped`; `StopAt(<step>)` by default.

    >>> from onstep import Engine
    >>> Engine(counting_step, [StopAt(3)]).run(jnp.int32(0), range(10), epochs=1).step
    3
    """

    def __init__(self, step: int, *, final: bool = True, reason: str | None = None):
        self.step: int = check_int("StopAt", "step", step, 1)
        self.final: bool = final
        self.reason: str | None = reason
        self.when: Cadence | int = at(step)

    def on_step_end(self, loop: Loop) -> None:
        loop.stop(self.reason or f"StopAt({self.step})", final=self.final)


class LogValues(Callback):
    """Records given values at given steps, in place of a real evaluation.

    Args:
        values: by step (counted from 1), the values by name.
        name: the callback's name; the class name by default.

    >>> from onstep import Engine
    >>> scores = LogValues({1: {"val/loss": 0.5}, 3: {"val/loss": 0.25}})
    >>> Engine(counting_step, [scores]).run(jnp.int32(0), range(4), epochs=1).history["val/loss"]
    [0.5, 0.25]
    """

    def __init__(self, values: Mapping[int, Mapping[str, Any]], *, name: str | None = None):
        self.values: dict[int, dict[str, Any]] = {step: dict(named) for step, named in values.items()}
        self.name: str | None = name
        self.when: Cadence | int = at(*self.values) if self.values else Cadence()

    def on_step_end(self, loop: Loop) -> None:
        loop.log(self.values[loop.step])


class RaiseIn(Callback):
    """Raises an error in one event.

    Args:
        event: with or without `on_`.
        error: what to raise.
        step: the number of completed steps at which to raise; every time by default.

    >>> from onstep import Engine
    >>> Engine(counting_step, [RaiseIn("step_end", ValueError("no"), step=2)]).run(jnp.int32(0), range(4), epochs=1)
    Traceback (most recent call last):
    ...
    ValueError: no
    onstep: raised by RaiseIn.on_step_end at step 2
    """

    def __init__(self, event: str, error: BaseException, *, step: int | None = None):
        method = event if event.startswith("on_") else f"on_{event}"
        if method not in EVENTS:
            raise ValueError(f"{event!r} is not an event.{did_you_mean(method, EVENTS)}")

        def raise_it(loop: Loop, *more: Any) -> None:
            if step is None or loop.step == step:
                raise error

        setattr(self, method, raise_it)
        if step is not None and method in BY_CADENCE:  # so that blocks are not cut before this step
            self.when: Cadence | int = at(max(step + (method == "on_step_begin"), 1))


class Restore(Callback):
    """Resumes from a result or snapshot in memory, without a checkpoint on disk.

    Args:
        source: the result or a snapshot of an earlier run.
        strict, skip: as for `Loop.restore`.

    >>> from onstep import Engine
    >>> first = Engine(counting_step, [StopAt(2, final=False)]).run(jnp.int32(0), [1, 2, 3], epochs=1)
    >>> int(Engine(counting_step, [Restore(first)]).run(jnp.int32(0), [1, 2, 3], epochs=1).state)
    6
    """

    def __init__(self, source: Result | Snapshot, *, strict: bool = True, skip: bool = True):
        self._snapshot = source.snapshot if isinstance(source, Result) else source
        self._strict, self._skip = strict, skip

    def on_load(self, loop: Loop) -> None:
        loop.restore(self._snapshot, strict=self._strict, skip=self._skip)


class FakeClock:
    """A clock that moves only when you tell it to: `Engine(..., clock=FakeClock())`.

    Args:
        now: the initial time, in seconds.

    Attributes:
        now: the time, which may be assigned.
        reads: how often the clock was read.

    >>> clock = FakeClock()
    >>> clock.advance(60)
    >>> clock()
    60.0
    """

    def __init__(self, now: float = 0.0):
        self.now: float = now
        self.reads: int = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now += seconds


class TickingBatches(list[Any]):
    """Batches that advance a `FakeClock` as each is drawn, so step n ends at n times `seconds`.

    Args:
        clock: the clock.
        batches: the batches.
        seconds: how long each batch takes.

    >>> clock = FakeClock()
    >>> [(batch, clock.now) for batch in TickingBatches(clock, ["a", "b"], seconds=30)]
    [('a', 30.0), ('b', 60.0)]
    """

    def __init__(self, clock: FakeClock, batches: Iterable[Any], *, seconds: float = 1.0):
        super().__init__(batches)
        self._clock, self._seconds = clock, seconds

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._clock.advance(self._seconds)
            yield batch


class FakeLoader:
    """A loader whose iterator saves and restores its position, like the loaders of grain.

    Args:
        batches: the batches of each pass.
        before: called with the index of each batch (from 0) before it is drawn. Raise an error in it to test a faulty
            source.

    Attributes:
        drawn: every batch that was drawn, in order, over all passes.
        sought: every position that `set_state` restored.

    >>> iterator = iter(FakeLoader(["a", "b", "c"]))
    >>> iterator.set_state({"next": 1})
    >>> next(iterator)
    'b'
    """

    def __init__(self, batches: Iterable[Any], before: Callable[[int], None] = lambda index: None):
        self.batches: list[Any] = list(batches)
        self.before: Callable[[int], None] = before
        self.drawn: list[Any] = []
        self.sought: list[int] = []

    def __iter__(self) -> FakeLoaderIterator:
        return FakeLoaderIterator(self)


class FakeLoaderIterator(Iterator[Any]):
    """The iterator of a `FakeLoader`. Subclass it for a loader that misbehaves.

    >>> iterator = iter(FakeLoader(["a", "b"]))
    >>> next(iterator), iterator.get_state()
    ('a', {'next': 1})
    """

    def __init__(self, loader: FakeLoader):
        self.loader: FakeLoader = loader
        self.next: int = 0

    def __next__(self) -> Any:
        self.loader.before(self.next)
        if self.next == len(self.loader.batches):
            raise StopIteration
        self.next += 1
        self.loader.drawn.append(self.loader.batches[self.next - 1])
        return self.loader.drawn[-1]

    def get_state(self) -> dict[str, int]:
        """Return the position in the pass."""
        return {"next": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue from a position that `get_state` returned."""
        self.loader.sought.append(state["next"])
        self.next = state["next"]


class SizedData:
    """Batches with a length of your choice, to test a wrong or missing length.

    Args:
        batches: the batches that iterating yields.
        length: the length that `len` returns, or an error that it raises.

    Attributes:
        drawn: every batch that was drawn, in order, over all passes.

    >>> data = SizedData([1, 2, 3], length=5)
    >>> len(data), list(data)
    (5, [1, 2, 3])
    """

    def __init__(self, batches: Iterable[Any], length: int | Exception):
        self.batches: list[Any] = list(batches)
        self.length: int | Exception = length
        self.drawn: list[Any] = []

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.drawn.append(batch)
            yield batch


def same_bytes(one: Any, other: Any) -> bool:
    """Return whether two pytrees have the same structure, and the same bytes in every leaf.

    >>> same_bytes({"w": jnp.float32(0.0)}, {"w": jnp.float32(-0.0)})
    False
    """

    def content(leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return array.dtype, array.shape, array.tobytes()

    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(content(a) == content(b) for a, b in pairs)
