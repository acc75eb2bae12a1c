"""Where the time of a run goes."""

from __future__ import annotations

import functools
import math
import sys
import time
from typing import Any, TextIO

import jax
import numpy as np
from onstep import Callback, Loop, Record, blocks, processes
from onstep.compiled import Program
from onstep.stopwatch import CALL, COMPILE, DATA, REST, WAIT, Stopwatch, follow

PARTS = (COMPILE, CALL, WAIT, DATA, REST)

PEAK = {
    # Dense bfloat16 FLOP/s (float16 on V100), from the makers' data sheets: nvidia.com/en-us/data-center
    # (where figures "with sparsity" are twice these) and cloud.google.com/tpu/docs/system-architecture-tpu-vm.
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
"""By `device_kind`, what a device can do at most."""


class Timing(Callback):
    """Says where the time of a run went: a table at its end, and rates on the way.

        compiling                  12.04 s   73.4%
        saving Checkpoint           2.05 s   12.5%
        waiting for the step        1.51 s    9.2%
        ...
        176 steps in 16.40 s: 10.7 steps/s, 687 examples/s

    Whoever waits for the device is charged: the loop, or a callback that reads an array. "The loop" is
    the engine itself, with `engine.steps` also the body of your `for`. List it first: of those before it
    it does not see on_load and on_run_end.

    With the training metrics it records, of the time since the last ones without compiling:
    `time/steps_per_second`, `time/examples_per_second` (by the leading axis of the first batch), the
    shares `time/data` and `time/callbacks`, and where the device's speed is known `time/mfu`: what the
    step's matrix products and convolutions use of it (Chowdhery et al., "PaLM", 2022, appendix B; but
    what is computed twice counts twice).

    Args:
        table: False prints none.
        file: where to; stderr without.
        name: the callback's name.

    Attributes:
        seconds: by part, of the last run.
    """

    def __init__(self, *, table: bool = True, file: TextIO | None = None, name: str | None = None):
        self.table: bool = table
        self.name: str | None = name
        self._file = file
        self.seconds: dict[str, float] = {}

    def on_load(self, loop: Loop) -> None:
        self._watch = Stopwatch(time.perf_counter)
        self._last: tuple[float, dict[str, float]] = math.inf, {}  # no step has run
        self._undo = follow(loop, self._watch, functools.partial(self._first, loop._program))

    def on_run_begin(self, loop: Loop) -> None:
        self._began = loop.step
        self._last = loop.step, self._watch.read()

    def on_log(self, loop: Loop, record: Record) -> None:
        step, before = self._last
        if loop.step > step and any(name.startswith("train/") for name in record.values):
            self._last = loop.step, self._watch.read()
            spent = {part: seconds - before.get(part, 0) for part, seconds in self._last[1].items() if part != COMPILE}
            whole = sum(spent.values())
            rate = (loop.step - step) / whole
            values = {"time/steps_per_second": rate}
            if self._rows:
                values["time/examples_per_second"] = rate * self._rows
            if self._least:
                values["time/mfu"] = rate * self._least
            values["time/data"] = spent[DATA] / whole
            values["time/callbacks"] = sum(s for part, s in spent.items() if part not in PARTS) / whole
            loop.log(values)

    def on_run_end(self, loop: Loop) -> None:
        self._undo.close()
        self.seconds = self._watch.read()
        if self.table and CALL in self.seconds and processes.writes():
            print(self._lines(loop.step - self._began), file=self._file or sys.stderr, flush=True)

    def _first(self, program: Program, bundle: Any, batch: Any, rng: Any) -> None:
        """What must be known of a step: its examples, and the seconds that it takes at least."""
        self._rows = next((len(leaf) for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)), 0)
        devices = {device for leaf in jax.tree.leaves(bundle) for device in leaf.sharding.device_set}
        peak = sum(PEAK.get(device.device_kind, 0) for device in devices)
        self._least = 0.0
        if peak and hasattr(program.call, "trace"):
            never = np.zeros(len(program.at_times), bool) if program.at_times else None
            self._least = flops(program._one.trace(bundle, batch, rng, never).jaxpr) / peak

    def _lines(self, steps: int) -> str:
        total = sum(self.seconds.values())
        shown = {part: s for part, s in self.seconds.items() if part in PARTS or s > total / 1000}
        if len(shown) < len(self.seconds):
            shown["other callbacks"] = total - sum(shown.values())
        width = max(map(len, shown))
        lines = [
            f"{part:<{width}} {seconds:9.2f} s {seconds / total:7.1%}"
            for part, seconds in sorted(shown.items(), key=lambda item: -item[1])
        ]
        lines.append(f"{steps:,} steps in {total:.2f} s: {_short(steps / total)} steps/s")
        if self._rows:
            lines[-1] += f", {_short(self._rows * steps / total)} examples/s"
        return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def flops(jaxpr: Any) -> float:
    """Of matrix products and convolutions. XLA's cost analysis would count the body of a loop once."""
    return sum(times * _products(equation) for equation, times in blocks.equations(jaxpr, 1))


def _products(equation: Any) -> float:
    if equation.primitive.name == "dot_general":
        return blocks.flops(equation)
    if equation.primitive.name != "conv_general_dilated":
        return 0
    kernel, out, given = equation.invars[1].aval, equation.outvars[0].aval, equation.params
    features = kernel.shape[given["dimension_numbers"].rhs_spec[0]]
    return 2 * out.size * kernel.size / features / math.prod(given["lhs_dilation"])  # zeros put in are no work
