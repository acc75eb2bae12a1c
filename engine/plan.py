"""Plan: what a run would do, as a value with text, Markdown and Mermaid views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from .cadence import ALWAYS, Cadence, as_cadence, every
from .callback import BY_CADENCE, EVENTS, Callback, FunctionCallback, overridden
from .checks import check_rng, check_state, check_targets
from .compiled.step import CompiledStep
from .compiled.throttle import FIRST, LONG
from .data.source import Data
from .data.stream import BatchStream
from .loop import Options
from .placement import Placement
from .result import Result
from .snapshot import unpack
from .trees import State, strip_weak_types, weak_leaves

CALL = "compiled call"
MOMENTS = {
    "on_load": "before anything else",
    "on_run_begin": "when the run begins",
    "on_epoch_begin": "when an epoch begins",
    "on_log": "at each record",
    "on_epoch_end": "when an epoch is complete",
    "on_snapshot": "before a snapshot is made",
    "on_exception": "if an error is raised",
    "on_run_end": "when the run ends, in reverse order",
}
"""When events without a cadence fire."""

Row = tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run would do: text to print, tables in a notebook. Made by `engine.plan`.

    Attributes:
        events: rows (event, when, next, callback), in the order of events and callbacks.
        compiled: rows (what, when, size) of what is compiled into the step, in order.
        steps_per_call: the most steps that a call will run, None if not decided yet.
        why: the reasons for that number.
        loop: where the loop next returns to the host, where it ends, and how many calls are in flight.

    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return state + batch, {}
    >>> engine = Engine(step, log_every=10)
    >>> @engine.on("step_end", when=25)
    ... def print_state(loop):
    ...     print(loop.state)
    >>> print(engine.plan(jnp.int32(0), range(30), steps=100))
    Events, in order, and the callbacks that handle them
      on_step_end  every 25 steps  step 25  print_state
    <BLANKLINE>
    Compiled into the step, in order
      1  step(state, batch)  every step  state: 4 bytes in 1 array
    <BLANKLINE>
    Steps per call: at most 10
      at most 128 for this step: more would gain nothing
      the first call runs at most 8 steps, later ones about 0.1 s worth
      log_every=10 ends a call every 10 steps
      print_state.on_step_end ends a call every 25 steps
      an epoch ends a call every 30 steps
    <BLANKLINE>
    The loop
      next returns to the host at step 10 (log_every=10)
      records train/ means every 10 steps (log_every) and epoch/ means every epoch
      ends at step 100
      keeps at most 2 compiled calls in flight
    """

    events: list[Row]
    compiled: list[Row]
    steps_per_call: int | None
    why: list[str]
    loop: list[str]

    def __repr__(self) -> str:
        return "\n\n".join("\n".join([title, *_aligned(rows)]) for title, _, rows in self._sections())

    def _repr_markdown_(self) -> str:
        def line(cells: Row) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        parts = []
        for title, heads, rows in self._sections():
            table = [line(row) for row in (heads, ("---",) * len(heads), *rows)]
            parts.append(f"**{title}**\n\n" + "\n".join(table if heads else [f"- {text}" for (text,) in rows]))
        return "\n\n".join(parts)

    def mermaid(self) -> str:
        """Return the events as a Mermaid graph, which GitHub, MkDocs and JupyterLab draw."""
        boxes = {event: [event] for event in (*EVENTS[:4], CALL, *EVENTS[4:])}
        boxes[CALL] += [f"{what}: {when}" for what, when, _ in self.compiled]
        for event, when, _, name in self.events:
            boxes[event].append(f"{name}: {when}" if event in BY_CADENCE else name)
        boxes = {event: texts for event, texts in boxes.items() if len(texts) > 1}
        way = [event for event in boxes if event != "on_exception"]
        loop = [event for event in way if event not in ("on_load", "on_run_begin", "on_run_end")]
        arrows = [(one, "-->", other) for one, other in pairwise(way)]
        arrows.append((loop[-1], "-->|again, until the target or a stop|", loop[0]))
        if "on_exception" in boxes:
            arrows.append((CALL, "-.->|an error, wherever it is raised|", "on_exception"))
        lines = [f'    {_id(event)}["{"<br/>".join(map(_escaped, texts))}"]' for event, texts in boxes.items()]
        lines += [f"    {_id(one)} {arrow} {_id(other)}" for one, arrow, other in arrows]
        return "\n".join(["flowchart TD", *lines])

    def _sections(self) -> list[tuple[str, Row, list[Row]]]:
        pairs = pairwise([("",), *self.events])
        events = [("" if row[0] == before[0] else row[0], *row[1:]) for before, row in pairs]
        compiled = [(str(number), *row) for number, row in enumerate(self.compiled, 1)]
        most = "not decided yet" if self.steps_per_call is None else f"at most {self.steps_per_call}"
        return [
            ("Events, in order, and the callbacks that handle them", ("event", "when", "next", "callback"), events),
            ("Compiled into the step, in order", ("", "what", "when", "size"), compiled),
            (f"Steps per call: {most}", (), [(reason,) for reason in self.why]),
            ("The loop", (), [(line,) for line in self.loop]),
        ]


def make_plan(
    compiled: CompiledStep,
    callbacks: dict[str, Callback],
    options: Options,
    placement: Placement,
    state: State | Result | None,
    data: Data | None,
    targets: dict[str, int | None],
    rng: jax.Array | None,
) -> Plan:
    """Return what a run would do; see `Engine.plan`.

    Args:
        compiled: a separate step, because this traces it.
        callbacks, options, placement: of the engine.
        state, data, rng: as for `Engine.run`.
        targets: epochs, steps and epoch_steps, as for `Engine.run`.
    """
    epochs, steps, epoch_steps = targets["epochs"], targets["steps"], targets["epoch_steps"]
    if (epochs, steps) != (None, None):
        check_targets(epochs, steps, epoch_steps)
    saved: dict[str, Any] = {"step": 0, "epoch": 0, "epoch_step": 0, "program": {"mode": None}}
    if isinstance(state, Result):
        saved, state = unpack(state.snapshot.host), state.state
    stream = None if data is None else BatchStream(data, epoch_steps, placement)
    if stream is not None and epochs is not None and steps is None:
        stream.check_epochs(epochs - saved["epoch"])
    length = epoch_steps if stream is None else stream.length
    where = Where(saved["step"], saved["epoch"], saved["epoch_step"], length, steps, epochs)
    if state is not None:
        check_state(state, "The state")
        compiled.function.weak = weak_leaves(state)
    shapes = None if state is None else jax.eval_shape(strip_weak_types, state)
    carries = None if state is None else jax.eval_shape(compiled.function.init, shapes)
    size, why = _block_size(compiled, shapes, carries, stream, saved["program"]["mode"], rng)
    cuts = {}
    if size:
        lengths = [(who, n) for who, cadence, _ in _stops(callbacks, options) for n in cadence.steps]
        lengths.append(("an epoch", length or size))
        cuts = {f"{who} ends a call {_every(n, 'step')}": n for who, n in lengths if n < size}
    most = None if size is None else min([max(size, 1), *cuts.values()])
    why += sorted(cuts, key=cuts.__getitem__)
    loop = _loop(callbacks, options, where)
    return Plan(_events(callbacks, where), _compiled(compiled, shapes, carries), most, why, loop)


@dataclass(frozen=True)
class Where:
    """Where a run begins, and where it ends."""

    step: int
    epoch: int
    epoch_step: int
    length: int | None
    steps: int | None
    epochs: int | None

    def completes(self, epoch: int) -> float:
        """Return the step that completes an epoch, counted from 1; infinity if unknown."""
        return math.inf if self.length is None else self.step - self.epoch_step + (epoch - self.epoch) * self.length

    @property
    def end(self) -> float:
        """The step at which the target is reached; infinity if unknown."""
        by_epochs = math.inf if self.epochs is None else self.completes(self.epochs)
        return min(by_epochs, math.inf if self.steps is None else self.steps)

    def next(self, cadence: Cadence) -> float:
        """Return the next step that is due by its number; infinity if unknown."""
        ends = [self.completes((self.epoch // n + 1) * n) for n in cadence.epochs]
        return min([cadence.next(self.step), *ends])


def words(cadence: Cadence) -> str:
    """Return a cadence in words.

    >>> words(every(1)), words(every(100) | every(epochs=1)), words(every(seconds=60))
    ('every step', 'every 100 steps and every epoch', 'every 60 s')
    """
    said = [_every(n, "step") for n in cadence.steps] + [_every(n, "epoch") for n in cadence.epochs]
    said += [f"every {seconds:g} s" for seconds in cadence.seconds]
    if cadence.points:
        said.append(f"at step{'s' * (len(cadence.points) > 1)} {', '.join(map(str, cadence.points))}")
    return " and ".join(said) or "never"


def _every(count: int, unit: str) -> str:
    return f"every {unit}" if count == 1 else f"every {count} {unit}s"


def _events(callbacks: dict[str, Callback], where: Where) -> list[Row]:
    rows: list[Row] = []
    for event in EVENTS:
        handling = {name: callback for name, callback in callbacks.items() if overridden(callback, event)}
        names = [_label(name, callback) for name, callback in handling.items()]
        if event not in BY_CADENCE:
            order = names[::-1] if event == "on_run_end" else names
            rows += [(event, MOMENTS[event], "", ", ".join(order))] if names else []
            continue
        for label, (name, callback) in zip(names, handling.items(), strict=True):
            cadence = as_cadence(callback.when, f"{name}.when")
            if event == "on_save":
                step = min(where.next(cadence), where.end)
                when = f"{words(cadence)}, and at the end" if cadence != Cadence() else "at the end"
                rows.append((event, when, "" if step == math.inf else f"step {step}", label))
            elif cadence != Cadence():  # an empty cadence is never due
                rows.append((event, words(cadence), _next(where.next(cadence), cadence, where), label))
    return rows


def _label(name: str, callback: Callback) -> str:
    kind = type(callback)
    return name if kind is FunctionCallback or name.startswith(kind.__name__) else f"{name} ({kind.__name__})"


def _next(step: float, cadence: Cadence, where: Where) -> str:
    if step <= where.end and step < math.inf:
        return f"step {step}"
    if cadence.seconds:
        return "by the clock"
    return "" if step == math.inf and cadence.epochs else "not in this run"


def _compiled(compiled: CompiledStep, shapes: Any, carries: Any) -> list[Row]:
    step = compiled.function.step
    arguments = "state, batch, rng" if compiled.takes_rng else "state, batch"
    size = "" if shapes is None else f"state: {_size(shapes)}"
    rows = [(f"{getattr(step, '__name__', type(step).__name__)}({arguments})", words(ALWAYS), size)]
    for name, half in compiled.function.transforms.items():
        size = f"carry: {_size(carries[name])}" if carries and jax.tree.leaves(carries[name]) else ""
        rows.append((name, words(as_cadence(half.update_when, f"{name}.update_when")), size))
    return rows


def _size(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    size, units = float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]} in {len(leaves)} array{'s' * (len(leaves) != 1)}"


def _block_size(
    compiled: CompiledStep, shapes: Any, carries: Any, stream: BatchStream | None, mode: str | None, rng: Any
) -> tuple[int | None, list[str]]:
    """Return the most steps in a call (0 for one step a call, None if not decided yet), and the reasons."""
    if not compiled.auto:
        asked = f"steps_per_call={compiled.block_size or 1}"
        return compiled.block_size, [asked if compiled.jit else "jit=False: nothing is compiled"]
    if shapes is None or stream is None:
        return None, ['"auto" decides from the step and a batch: pass the state and the data to plan']
    if stream.one_shot:
        return None, [
            f"the data ({type(stream.data).__name__}) can be read only once, so plan took no batch from it to decide"
        ]
    check_rng(rng, compiled.function.step if compiled.takes_rng else None)
    stream.begin_epoch(0)
    batch, rng = stream.peek(), rng if compiled.needs_step else None
    bundle = shapes, carries, jax.ShapeDtypeStruct((), jnp.int32) if compiled.needs_step else None
    size, why = compiled.choose_block_size(bundle, jax.eval_shape(lambda x: x, batch), batch, rng, mode)
    if not size:
        return 0, [f"one step a call: {why}"]
    return size, [
        f"at most {size} for this step: {why}",
        f"the first call runs at most {FIRST} steps, later ones about {LONG:g} s worth",
    ]


def _stops(callbacks: dict[str, Callback], options: Options) -> Iterator[tuple[str, Cadence, bool]]:
    """Yield what makes the loop return to the host: who, when, and whether before the step that is due."""
    yield f"log_every={options.log_every}", every(options.log_every), False
    for name, callback in callbacks.items():
        for event in BY_CADENCE:
            if overridden(callback, event):
                yield f"{name}.{event}", as_cadence(callback.when, f"{name}.when"), event == "on_step_begin"


def _loop(callbacks: dict[str, Callback], options: Options, where: Where) -> list[str]:
    stops = [(where.completes(where.epoch + 1), f"the end of epoch {where.epoch + 1}"), (where.end, "the target")]
    second = replace(where, step=where.step + 1, epoch_step=where.epoch_step + 1)
    for who, cadence, before in _stops(callbacks, options):
        # What is due before the first step does not end a call.
        stops.append((second.next(cadence) - 1 if before else where.next(cadence), who))
    clocked = [
        f"{words(Cadence(seconds=cadence.seconds))} ({who})"
        for who, cadence, _ in _stops(callbacks, options)
        if cadence.seconds
    ]
    first = min(step for step, _ in stops)
    lines = [f"next returns to the host at step {first} ({', '.join(who for step, who in stops if step == first)})"]
    lines += [f"also returns to the host {text}" for text in clocked]
    lines.append(f"records train/ means {_every(options.log_every, 'step')} (log_every) and epoch/ means every epoch")
    if where.end < math.inf:
        lines.append(f"ends at step {where.end}")
    elif where.epochs is not None:
        lines.append(f"ends with epoch {where.epochs}, whose last step is not known in advance")
    flight = f"keeps at most {options.in_flight} compiled call{'s' * (options.in_flight > 1)} in flight"
    batches = f"{options.prefetch} batch{'es' * (options.prefetch > 1)}"
    ahead = f", and moves {batches} to the device in advance" if options.prefetch else ""
    return [*lines, flight + ahead]


def _aligned(rows: list[Row]) -> list[str]:
    rows = rows or [("none",)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _id(event: str) -> str:
    return event.replace(" ", "_")


def _escaped(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
