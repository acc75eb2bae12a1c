"""Measure where the time of a run goes."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TextIO

import jax
from onstep import Callback, Loop, Record, processes
from onstep.tools import Observer, Span, count_flops, has_training_metrics, print_text

COMPILE, CALL, WAIT, DATA, REST = "compiling", "calling the step", "waiting for the step", "data", "the loop"
PARTS = {"compile": COMPILE, "call": CALL, "wait": WAIT, "data": DATA}
"""The parts of a run by the kind of their spans. Callbacks have parts of their own, and `REST` is all other time."""

PEAK = {
    # Dense bfloat16 FLOP/s (float16 on V100), from the manufacturers' data sheets: nvidia.com/en-us/data-center
    # (its figures "with sparsity" are twice these) and cloud.google.com/tpu/docs/system-architecture-tpu-vm.
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Peak FLOP/s of a device, by its `device_kind`."""


class Stopwatch(Observer):
    """Measures where time goes: all time is charged to the innermost span, or to the loop outside of all spans.

    Args:
        clock: returns the time in seconds.

    Attributes:
        seconds: seconds by part, up to the last change of the part. They add up to the time since the stopwatch
            was made.

    >>> from onstep.testing import FakeClock
    >>> clock = FakeClock()
    >>> watch = Stopwatch(clock)
    >>> watch.begin(Span("callback", "EMA", "on_step_end"))
    >>> clock.advance(2)
    >>> watch.begin(Span("wait"))
    >>> clock.advance(3)
    >>> watch.end(Span("wait"))
    >>> watch.read()
    {'the loop': 0.0, 'callback EMA': 2.0, 'waiting for the step': 3.0}
    """

    def __init__(self, clock: Callable[[], float]):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._part, self._since = clock, REST, clock()
        self._outer: list[str] = []  # the parts that the open spans interrupted

    def begin(self, span: Span) -> None:
        self._outer.append(self._part)
        self._switch(part_of(span))

    def end(self, span: Span) -> None:
        self._switch(self._outer.pop())

    def read(self) -> dict[str, float]:
        """Return the seconds of each part until now."""
        self._switch(self._part)
        return dict(self.seconds)

    def reattribute(self, part: str, seconds: float) -> None:
        """Move the last seconds to another part, up to the time since the current part began."""
        now = self._clock()
        elapsed = now - self._since
        seconds = min(seconds, elapsed)
        self.seconds[self._part] += elapsed - seconds
        self.seconds[part] += seconds
        self._since = now

    def _switch(self, part: str) -> None:
        now = self._clock()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


def part_of(span: Span) -> str:
    """Return the name that the table shows for a span.

    >>> part_of(Span("save", "Checkpoint", "on_save"))
    'saving Checkpoint'
    """
    if span.kind in PARTS:
        return PARTS[span.kind]
    return f"{'saving' if span.kind == 'save' else 'callback'} {span.callback}"


@dataclass(eq=False, repr=False)
class Timing(Callback):
    """Measures where the time of a run goes: prints a table at its end, and records rates during it.

        compiling                  12.04 s   73.4%
        saving Checkpoint           2.05 s   12.5%
        waiting for the step        1.51 s    9.2%
        ...
        176 steps in 16.40 s: 10.7 steps/s, 687 examples/s

    Use it to see whether a run waits for its data, its callbacks or the device. Time spent waiting for
    the device is charged to the part that waits: the loop, or a callback that reads an array. "The loop" is the engine
    itself and, with `engine.steps`, also the body of your `for` loop. List `Timing` first. It does not see `on_load`
    and `on_run_end` of the callbacks before it.

    With the training metrics it records the rates since the previous ones, without compile time:
    `time/steps_per_second`, `time/examples_per_second` (by the leading axis of the first batch), the shares
    `time/data` and `time/callbacks`, and `time/mfu` where the peak speed of the device is known. This is the share
    of the peak that the matrix products and convolutions of a step use (Chowdhery et al., "PaLM", 2022, appendix B,
    except that recomputed values count every time). If anything was compiled since, `time/compiling` has its seconds.

    Args:
        table: False prints no table.
        file: where to print the table; stderr by default.
        name: the callback's name.

    Attributes:
        seconds: seconds by part, of the last run.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> timing = Timing(table=False)
    >>> result = Engine(lambda state, batch: (state + batch, {}), [timing]).run(jnp.int32(0), [1, 2], epochs=1)
    >>> sorted(timing.seconds)
    ['callback Timing', 'calling the step', 'compiling', 'data', 'the loop', 'waiting for the step']
    """

    _: KW_ONLY
    table: bool = True
    file: TextIO | None = None
    name: str | None = None
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    def on_load(self, loop: Loop) -> None:
        self._watch = watch = Stopwatch(time.perf_counter)
        self._last: tuple[float, dict[str, float]] = math.inf, {}  # no step has run
        self._step: tuple[int, float] | None = None  # examples of a step, and seconds that it takes at peak speed
        self._recorded = 0.0  # seconds of compiling that are in the records
        loop.observe(watch)
        thread = threading.get_ident()

        def compiled(event: str, duration_secs: float, **_: Any) -> None:
            if event.startswith("/jax/core/compile/") and threading.get_ident() == thread:
                watch.reattribute(COMPILE, duration_secs)

        self._compiled = compiled
        jax.monitoring.register_event_duration_secs_listener(compiled)

    def on_run_begin(self, loop: Loop) -> None:
        self._last = loop.step, self._watch.read()

    def on_log(self, loop: Loop, record: Record) -> None:
        step, before = self._last
        if loop.step > step and has_training_metrics(record):
            self._last = loop.step, self._watch.read()
            spent = {part: seconds - before.get(part, 0) for part, seconds in self._last[1].items() if part != COMPILE}
            total = sum(spent.values())
            rate = (loop.step - step) / total
            examples, least = self._measured(loop)
            values = {"time/steps_per_second": rate}
            if examples:
                values["time/examples_per_second"] = rate * examples
            if least:
                values["time/mfu"] = rate * least
            values["time/data"] = spent[DATA] / total
            values["time/callbacks"] = (
                sum(s for part, s in spent.items() if part not in (CALL, WAIT, DATA, REST)) / total
            )
            compiling = self._last[1].get(COMPILE, 0.0) - self._recorded
            if compiling:
                values["time/compiling"], self._recorded = compiling, self._recorded + compiling
            loop.log(values)

    def on_run_end(self, loop: Loop) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        self.seconds = self._watch.read()
        if self.table and CALL in self.seconds and processes.writes():
            lines = table_lines(self.seconds, loop.step - loop.start_step, self._measured(loop)[0])
            print_text("\n".join(lines), self.file or sys.stderr)

    def _measured(self, loop: Loop) -> tuple[int, float]:
        """Return the examples of a step, and its seconds at the peak speed of its devices; 0 for what is unknown."""
        if self._step is None:
            devices = {d for leaf in jax.tree.leaves((loop.state, loop.carries)) for d in leaf.sharding.device_set}
            peak, traced = sum(PEAK.get(device.device_kind, 0) for device in devices), loop.traced
            if traced is None:  # nothing is compiled
                self._step = count_examples(loop.batch), 0.0
            else:
                (_, batch, *_), _ = traced.args_info
                self._step = count_examples(batch), count_flops(traced.jaxpr) / peak if peak else 0.0
        return self._step


def count_examples(batch: Any) -> int:
    """Return the leading axis of the first leaf that has one, 0 if none has.

    >>> count_examples({"x": jax.numpy.zeros((32, 28, 28))})
    32
    """
    shapes = (getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(batch))
    return next((shape[0] for shape in shapes if shape), 0)


def table_lines(seconds: dict[str, float], steps: int, examples: int) -> list[str]:
    """Return the lines of the table, the longest part first. Callbacks that took under 0.1% share a line.

    >>> for line in table_lines({"the loop": 1.0, "data": 3.0}, steps=8, examples=10):
    ...     print(line)
    data          3.00 s   75.0%
    the loop      1.00 s   25.0%
    8 steps in 4.00 s: 2 steps/s, 20 examples/s
    """
    total = sum(seconds.values())
    shown = {part: s for part, s in seconds.items() if part in (*PARTS.values(), REST) or s > total / 1000}
    if len(shown) < len(seconds):
        shown["other callbacks"] = total - sum(shown.values())
    width = max(map(len, shown))
    lines = [
        f"{part:<{width}} {took:9.2f} s {took / total:7.1%}"
        for part, took in sorted(shown.items(), key=lambda item: -item[1])
    ]
    rate = f"{steps:,} steps in {total:.2f} s: {number_text(steps / total)} steps/s"
    return [*lines, f"{rate}, {number_text(examples * steps / total)} examples/s" if examples else rate]


def number_text(number: float) -> str:
    """Return a number with three significant digits, or as an integer from 100 on.

    >>> number_text(12345.6), number_text(0.012345)
    ('12,346', '0.0123')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
