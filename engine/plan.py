"""What an engine will do, as a page to read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from . import blocks, checks
from .cadence import ALWAYS, Cadence, as_cadence, every
from .callback import EVENTS, Callback, Function, own
from .compiled import Traced
from .events import BY_CADENCE
from .feed import Feed
from .pace import FIRST, LONG
from .result import Result
from .snapshot import unpack
from .source import Data
from .trees import State, strong

if TYPE_CHECKING:
    from .engine import Engine

CALL = "compiled call"
MOMENTS = {
    "on_load": "before anything else",
    "on_run_begin": "when the run begins",
    "on_epoch_begin": "when an epoch begins",
    "on_log": "at each record",
    "on_epoch_end": "when an epoch is complete",
    "on_exception": "if something raises",
    "on_run_end": "when the run ends, in reverse",
}
"""When the events come that no cadence governs."""

Row = tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Plan:
    """What an engine will do: a page to print, tables in a notebook.

    Attributes:
        events: (event, when, next, callback), in the order of events and callbacks.
        compiled: (what, when, carry) of what is compiled into the step, in order.
        steps_per_call: the most steps that a call will run, None where that is not decided.
        why: the reasons for that number.
        loop: where the loop stops for the host next, where it ends, what is queued.
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
        """The events as a graph in Mermaid's language, which GitHub, MkDocs and JupyterLab draw."""
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
        most = "not decided" if self.steps_per_call is None else f"at most {self.steps_per_call}"
        return [
            ("Events, in order, and the callbacks that answer", ("event", "when", "next", "callback"), events),
            ("Compiled into the step, in order", ("", "what", "when", "size"), compiled),
            (f"Steps in a call: {most}", (), [(reason,) for reason in self.why]),
            ("The loop", (), [(line,) for line in self.loop]),
        ]


def plan(
    self: Engine,
    state: State | Result | None = None,
    data: Data | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    epoch_steps: int | None = None,
    rng: jax.Array | None = None,
) -> Plan:
    """What `run` would do with the same arguments, on a page: `print(engine.plan())`.

    Nothing runs, no event comes, nothing is donated or written. All arguments may be left out; each
    lets the plan say more. With state and data the step is traced for one batch, which is drawn from
    a pass of its own; data that can be read only once is left alone.

    Args:
        state: as for `run`; gives the sizes of the carries.
        data: as for `run`; gives the length of an epoch, and with the state the steps in a call.
        epochs, steps, epoch_steps, rng: as for `run`.

    Raises:
        TypeError, ValueError: as `run` would, as far as that is known without running.
    """
    if (epochs, steps) != (None, None):
        checks.targets(epochs, steps, epoch_steps)
    saved: dict[str, Any] = {"step": 0, "epoch": 0, "epoch_step": 0, "program": {"mode": None}}
    if isinstance(state, Result):
        saved, state = unpack(state.snapshot.host), state.state
    feed = None if data is None else Feed(data, epoch_steps)
    length = epoch_steps if feed is None else feed.length
    where = Where(saved["step"], saved["epoch"], saved["epoch_step"], length, steps, epochs)
    shapes = None if state is None else jax.eval_shape(strong, state)
    carries = None if state is None else jax.eval_shape(self._program._traced.init, shapes)
    rows, why = _rows(self, shapes, carries, feed, saved["program"]["mode"], rng)
    cuts = {}
    if rows:
        lengths = [(who, n) for who, cadence, _ in _stops(self) for n in cadence.steps] + [("an epoch", length or rows)]
        cuts = {f"{who} ends a call {_every(n, 'step')}": n for who, n in lengths if n < rows}
    most = None if rows is None else min([max(rows, 1), *cuts.values()])
    why += sorted(cuts, key=cuts.__getitem__)
    return Plan(_events(self, where), _compiled(self, shapes, carries), most, why, _loop(self, where))


@dataclass(frozen=True)
class Where:
    """Where a run begins, and where it goes."""

    step: int
    epoch: int
    epoch_step: int
    length: int | None
    steps: int | None
    epochs: int | None

    def completes(self, epoch: int) -> float:
        """The step that completes an epoch, counted from 1; infinity where that is not known."""
        return math.inf if self.length is None else self.step - self.epoch_step + (epoch - self.epoch) * self.length

    @property
    def end(self) -> float:
        """The step at which the target is reached; infinity where that is not known."""
        by_epochs = math.inf if self.epochs is None else self.completes(self.epochs)
        return min(by_epochs, math.inf if self.steps is None else self.steps)

    def next(self, cadence: Cadence) -> float:
        """The next step that is due by its number; infinity where that is not known."""
        ends = [self.completes((self.epoch // n + 1) * n) for n in cadence.epochs]
        return min([cadence.next(self.step), *ends])


def words(cadence: Cadence) -> str:
    """A cadence as one would say it.

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


def _events(engine: Engine, where: Where) -> list[Row]:
    rows: list[Row] = []
    for event in EVENTS:
        answers = {name: callback for name, callback in engine.callbacks.items() if own(callback, event)}
        names = [_named(name, callback) for name, callback in answers.items()]
        if event not in BY_CADENCE:
            order = names[::-1] if event == "on_run_end" else names
            rows += [(event, MOMENTS[event], "", ", ".join(order))] if names else []
            continue
        for shown, (name, callback) in zip(names, answers.items(), strict=True):
            cadence = as_cadence(callback.when, f"{name}.when")
            if event == "on_save":
                step = min(where.next(cadence), where.end)
                when = f"{words(cadence)}, and at the end" if cadence != Cadence() else "at the end"
                rows.append((event, when, "" if step == math.inf else f"step {step}", shown))
            elif cadence != Cadence():  # which is never due
                rows.append((event, words(cadence), _at(where.next(cadence), cadence, where), shown))
    return rows


def _named(name: str, callback: Callback) -> str:
    kind = type(callback)
    return name if kind is Function or name.startswith(kind.__name__) else f"{name} ({kind.__name__})"


def _at(step: float, cadence: Cadence, where: Where) -> str:
    if step <= where.end and step < math.inf:
        return f"step {step}"
    if cadence.seconds:
        return "by the clock"
    return "" if step == math.inf and cadence.epochs else "not in this run"


def _compiled(engine: Engine, shapes: Any, carries: Any) -> list[Row]:
    program = engine._program
    step = getattr(program._traced.step, "__name__", type(program._traced.step).__name__)
    arguments = "state, batch, rng" if program.takes_rng else "state, batch"
    rows = [(f"{step}({arguments})", words(ALWAYS), "" if shapes is None else f"state: {_size(shapes)}")]
    for name, half in program._traced.halves.items():
        size = f"carry: {_size(carries[name])}" if carries and jax.tree.leaves(carries[name]) else ""
        rows.append((name, words(as_cadence(half.update_when, f"{name}.update_when")), size))
    return rows


def _size(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    size, units = float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]} in {len(leaves)} array{'s' * (len(leaves) != 1)}"


def _rows(
    engine: Engine, shapes: Any, carries: Any, feed: Feed | None, mode: str | None, rng: Any
) -> tuple[int | None, list[str]]:
    """The most steps in a call as the program decides it (0: one by one, None: not yet), and why."""
    program = engine._program
    if not program.auto:
        asked = f"steps_per_call={program.rows or 1}"
        return program.rows, [asked if program._jit else "jit=False: nothing is compiled"]
    if shapes is None or feed is None:
        return None, ['"auto" decides from the step and a batch: give plan the state and the data']
    if feed.one_shot:
        return None, [f"a {type(feed.data).__name__} can be read only once, so plan drew no batch to decide from"]
    if mode == "plain":
        return 0, ["one by one, as in the run that goes on"]
    if program.spread is not None and mode is None:
        return 0, ["one by one: several steps in a call are not measured on many devices"]
    checks.random_key(rng, needed=program.takes_rng)
    feed.begin_epoch(0)
    batch = feed.peek()
    traced = Traced(program._traced.step, program._traced.halves, list(program.at_times), program.takes_rng)
    bundle = shapes, carries, jax.ShapeDtypeStruct((), jnp.int32) if program.counted else None
    due = np.zeros(len(program.at_times), bool) if program.at_times else None
    like = jax.eval_shape(lambda x: x, batch)
    jaxpr = jax.jit(traced).trace(bundle, like, rng if program.counted else None, due).jaxpr
    rows, why = blocks.decide(jaxpr, batch)
    if mode == "block":  # and the run goes on in it
        rows = max(rows, 2)
    if not rows:
        return 0, [f"one by one: {why}"]
    return rows, [
        f"at most {rows} by the step: {why}",
        f"the first call has at most {FIRST}, then as many as take about {LONG:g} s",
    ]


def _stops(engine: Engine) -> Iterator[tuple[str, Cadence, bool]]:
    """What the loop stops for: who, when, and whether before the step that is due."""
    yield f"log_every={engine._log_every}", every(engine._log_every), False
    for name, callback in engine.callbacks.items():
        for event in BY_CADENCE:
            if own(callback, event):
                yield f"{name}.{event}", as_cadence(callback.when, f"{name}.when"), event == "on_step_begin"


def _loop(engine: Engine, where: Where) -> list[str]:
    stops = [(where.completes(where.epoch + 1), f"the end of epoch {where.epoch + 1}"), (where.end, "the target")]
    second = replace(where, step=where.step + 1, epoch_step=where.epoch_step + 1)
    for who, cadence, before in _stops(engine):  # what is due before the first step is no stop between two
        stops.append((second.next(cadence) - 1 if before else where.next(cadence), who))
    clocked = [
        f"{who} {words(Cadence(seconds=cadence.seconds))}" for who, cadence, _ in _stops(engine) if cadence.seconds
    ]
    first = min(step for step, _ in stops)
    lines = [f"it stops next at step {first}, for {', '.join(who for step, who in stops if step == first)}"]
    lines += [f"it stops by the clock for {who}" for who in clocked]
    lines.append(
        f"it records train/ means {_every(engine._log_every, 'step')} (log_every) and epoch/ means every epoch"
    )
    if where.end < math.inf:
        lines.append(f"it ends at step {where.end}")
    elif where.epochs is not None:
        lines.append(f"it ends with epoch {where.epochs}, whose step is not known before")
    queue = f"at most {engine._in_flight} compiled calls are queued"
    lines.append(queue + (f", and {engine._prefetch} batches are put on the device ahead" if engine._prefetch else ""))
    return lines


def _aligned(rows: list[Row]) -> list[str]:
    rows = rows or [("none",)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _id(event: str) -> str:
    return event.replace(" ", "_")


def _escaped(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
