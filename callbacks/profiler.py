"""Trace a few steps with jax.profiler."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass

import jax
from onstep import Cadence, Callback, Loop, at
from onstep.tools import check_int, local_path


@dataclass(eq=False, repr=False)
class Profiler(Callback):
    """Traces the steps from `start + 1` to `start + steps` with `jax.profiler`.

    Use it to see what the host and the device do during a step. View the trace with `tensorboard --logdir
    <directory>` and its plugin `xprof`, or open the `trace.json.gz` that it contains in https://ui.perfetto.dev.

    Steps are absolute. A run that ends before `start`, or resumes after it, writes nothing. A run that ends during
    the trace writes the steps it has traced.

    Args:
        directory: where to write the trace, in `plugins/profile`. It can be the directory of `TensorBoard`.
        start: the number of steps to run before the trace. The first steps of a run are slower than later ones, and
            the very first one compiles: a run that begins or resumes at exactly this step traces one step later.
        steps: the number of steps to trace. Long traces are large.
        name: the callback's name.

    Raises:
        ValueError: `start` is negative, `steps` is less than 1, or `directory` is a URL.
        RuntimeError: another trace is running when this one starts.

    >>> import tempfile
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     profiler = Profiler(directory, start=2, steps=3)  # traces steps 3, 4 and 5
    ...     _ = Engine(counting_step, [profiler]).run(0, range(9), epochs=1)
    ...     os.listdir(directory)
    ['plugins']
    """

    directory: str | os.PathLike[str]
    _: KW_ONLY
    start: int = 10
    steps: int = 5
    name: str | None = None

    def __post_init__(self) -> None:
        check_int("Profiler", "start", self.start, 0)
        check_int("Profiler", "steps", self.steps, 1)
        self._path = local_path("Profiler", self.directory)
        first, last = self.start + 1, self.start + self.steps
        self.when: Cadence | int = at(*sorted({first, first + 1, last, last + 1}))
        self._tracing = False

    def on_run_begin(self, loop: Loop) -> None:
        self._start = self.start + (loop.step == self.start)  # not while the first step compiles

    def on_step_begin(self, loop: Loop) -> None:
        if loop.step == self._start:
            try:
                jax.profiler.start_trace(self._path)
            except RuntimeError as error:
                raise RuntimeError(
                    f"Profiler needs to start a trace at step {loop.step + 1}, but another trace is running. "
                    "Stop it first, or trace other steps: Profiler(..., start=...)."
                ) from error
            self._tracing = True

    def on_step_end(self, loop: Loop) -> None:
        if loop.step == self._start + self.steps and self._tracing:
            jax.block_until_ready(loop.state)
            self._stop()

    def on_run_end(self, loop: Loop) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
