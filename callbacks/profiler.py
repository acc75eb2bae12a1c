"""Trace a few steps with jax.profiler."""

from __future__ import annotations

import os

import jax
from onstep import Cadence, Callback, Loop, at
from onstep.checks import whole


class Profiler(Callback):
    """Traces the steps from `start + 1` to `start + steps` with `jax.profiler`.

    Look at the trace with `tensorboard --logdir <directory>` (and its plugin `xprof`), or open the
    `trace.json.gz` that it writes in https://ui.perfetto.dev. Steps are absolute: a run that goes on
    behind `start`, or ends before, traces none and writes nothing. One that ends in between
    writes what there is.

    Args:
        directory: where to write, below `plugins/profile`; that of TensorBoard will do.
        start: steps to run before; compilation is no part of the trace, but the first steps are
            slower than others.
        steps: steps to trace; a trace of many is large.
        name: the callback's name.

    Raises:
        RuntimeError: another trace is active when this one shall start.
    """

    def __init__(self, directory: str | os.PathLike[str], *, start: int = 10, steps: int = 5, name: str | None = None):
        whole("Profiler", "start", start, 0)
        whole("Profiler", "steps", steps, 1)
        self.directory: str = os.fspath(directory)
        self.start: int = start
        self.steps: int = steps
        self.name: str | None = name
        self.when: Cadence | int = at(start + 1, start + steps)
        self._tracing = False

    def on_step_begin(self, loop: Loop) -> None:
        if loop.step == self.start:
            try:
                jax.profiler.start_trace(self.directory)
            except RuntimeError as error:
                raise RuntimeError(
                    f"Profiler needs to start a trace at step {loop.step + 1}, but jax has one running. "
                    "Stop that one before, or trace other steps: Profiler(..., start=...)."
                ) from error
            self._tracing = True

    def on_step_end(self, loop: Loop) -> None:
        if loop.step == self.start + self.steps and self._tracing:
            jax.block_until_ready(loop.state)
            self._stop()

    def on_run_end(self, loop: Loop) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
