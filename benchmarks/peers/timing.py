"""Shared by the scripts of the peers: time a peer's loop and a bare loop in turn, on the same batches.

The data source takes the time, from the request for the first counted batch to the request after the
last. So the time includes no work around a run (compilation, start, end of an epoch), however a peer
does it. Every case runs once per round, so a slow moment of the machine affects all of them. Results
are medians over rounds.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
import workloads

LOG_EVERY = 100
CALL = 32  # Keras's steps_per_execution; all counts are multiples of it, so that no execution is cut short
WARM = 2 * CALL  # batches before and after the counted ones, enough to fill the device's queue


class Batches:
    """Ready batches that measure the time in which the counted ones are consumed."""

    def __init__(self, ready, steps):
        self.around = [ready[i % len(ready)] for i in range(WARM)]
        self.counted = [ready[i % len(ready)] for i in range(steps)]

    def __len__(self):
        return 2 * WARM + len(self.counted)

    def __iter__(self):
        yield from self.around
        start = time.perf_counter()
        yield from self.counted
        self.microseconds = (time.perf_counter() - start) / len(self.counted) * 1e6
        yield from self.around


def bare(step, state, data):
    for batch in data:
        state, _ = step(state, batch)


def noop():
    """Create a workload with the batches of W1 and a step that returns constants, to time the loop alone."""
    metrics = {"loss": jnp.float32(1)}
    return dataclasses.replace(
        workloads.one_layer(),
        name="no-op",
        step=lambda state, batch: (state, metrics, {}),
        state={"params": jnp.float32(0)},
    )


def compare(name, cases, rounds):
    """Yield the rows of one workload, one row per case."""
    workload = noop() if name == "no-op" else workloads.WORKLOADS[name]()

    def step(state, batch):
        return workload.step(state, batch)[:2]

    if name != "no-op":
        step = jax.jit(step, donate_argnums=0)
    starts = range(0, len(workload.arrays["x"]), workload.batch_size)
    ready = [{key: array[i : i + workload.batch_size] for key, array in workload.arrays.items()} for i in starts]
    runs = {"bare": bare, **cases}
    times = {case: [] for case in runs}
    for _ in range(rounds):
        for case, run in runs.items():
            data = Batches(ready, workload.steps // CALL * CALL)
            run(step, jax.tree_util.tree_map(jnp.array, workload.state), data)  # a copy: the step donates it
            times[case].append(data.microseconds)
    for case in cases:
        pairs = list(zip(times[case], times["bare"], strict=True))
        yield {
            "workload": name,
            "case": case,
            "us_per_step": statistics.median(times[case]),
            "bare_us": statistics.median(times["bare"]),
            "ratio": statistics.median(peer / base for peer, base in pairs),
            "adds_us": statistics.median(peer - base for peer, base in pairs),
        }


def main(peer, version, cases):
    """Time a peer's cases and print one JSON object.

    Args:
        peer: its name.
        version: its installed version.
        cases: function from the name of a workload to a dict of cases, each a `run(step, state, data)`.
    """
    parser = argparse.ArgumentParser(description=f"Times {peer}.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [row for name in ("no-op", "W1", "W3") for row in compare(name, cases(name), rounds)]
    versions = {"version": version, "jax": jax.__version__, "python": platform.python_version()}
    print(json.dumps({"peer": peer, **versions, "rows": rows}))
