"""Measure what must stay small: memory over a long run, the number of compilations, import time.

Run: python benchmarks/limits.py [--steps 50000]
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import warnings

import jax
from loops import Loops
from measure import machine
from onstep import Callback, every
from workloads import one_layer

COMPILED = "/jax/core/compile/backend_compile_duration"


class Memory(Callback):
    """Records resident memory in MB and the number of live arrays."""

    when = every(5000)

    def __init__(self):
        self.resident, self.live = [], []

    def on_step_end(self, loop):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.live.append(len(jax.live_arrays()))


def memory(steps):
    """Print the growth of memory over a long run with the usual callbacks."""
    loops, recorder = Loops(one_layer(), steps), Memory()
    engine = loops.engine(usual=True, options={}, more=[recorder])
    engine.run(loops.workload.state, loops.data, steps=steps)
    loops.close()
    first = recorder.resident[1]  # the first save, after step 5000, loads Orbax
    print(f"resident memory from step 10000 to {steps}: {first:.0f} MB, {recorder.resident[-1] - first:+.1f} MB")
    print(f"live arrays every 5000 steps: {sorted(set(recorder.live))}")


def compilations():
    """Print how often XLA compiles in a run, before and after step 100."""
    loops, events = Loops(one_layer(), 2000), []
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("onstep")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name == COMPILED))
    engine = loops.engine(usual=False, options={})
    before, counts = [], []
    engine.on("run_begin")(lambda loop: before.append(sum(events)))
    engine.on("step_end", when=100)(lambda loop: counts.append(sum(events) - before[0]))
    engine.run(loops.workload.state, loops.data, steps=2000)
    loops.close()
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    print(f"compilations: {counts[0]} before step 100, {counts[-1] - counts[0]} afterwards; logged: {messages}")


def imports(rounds=9):
    """Print the time of `import onstep` after jax is imported; each measurement starts a new process."""
    code = "import time, jax; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    for module in ("onstep", "onstep.callbacks"):
        command = [sys.executable, "-c", code.format(module)]
        times = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(rounds)]
        print(f"import {module}, after jax: {statistics.median(times) * 1e3:.0f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50_000)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "EarlyStopping watches")  # epochs are shorter than its cadence
    print("; ".join(machine(f"{os.cpu_count()} cores").values()))
    imports()
    compilations()
    memory(options.steps)


if __name__ == "__main__":
    main()
