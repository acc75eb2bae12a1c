"""What the peers' scripts share: a peer's loop and a bare one, in turn, on the same batches.

A run is timed from its data: from the moment a loop asks for the first counted batch until it asks
for the one after the last. What surrounds a run (compiling, starting, ending an epoch) so counts
for nothing, however a peer does it. Every case runs once a round, so that a slow moment of the
machine meets all of them; figures are medians over rounds.
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
CALL = 32  # steps in one of Keras's executions; all counts are multiples, so that none is cut
WARM = 2 * CALL  # batches before the counted ones, enough to fill the device's queue, and as many after


class Batches:
    """Ready batches, as often as asked for, and a clock that runs while the counted ones are taken."""

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
    """The batches of W1 and a step that hands back what is ready: what is left is the loop."""
    metrics = {"loss": jnp.float32(1)}
    return dataclasses.replace(
        workloads.one_layer(),
        name="no-op",
        step=lambda state, batch: (state, metrics, {}),
        state={"params": jnp.float32(0)},
    )


def compared(name, cases, rounds):
    """The rows of one workload, a row a case."""
    workload = noop() if name == "no-op" else workloads.WORKLOADS[name]()

    def step(state, batch):
        return workload.step(state, batch)[:2]

    if name != "no-op":
        step = jax.jit(step, donate_argnums=0)
    starts = range(0, len(workload.arrays["x"]), workload.batch_size)
    ready = [{key: array[i : i + workload.batch_size] for key, array in workload.arrays.items()} for i in starts]
    runs = {"bare": bare, **cases}
    took = {case: [] for case in runs}
    for _ in range(rounds):
        for case, run in runs.items():
            data = Batches(ready, workload.steps // CALL * CALL)
            run(step, jax.tree_util.tree_map(jnp.array, workload.state), data)  # a copy: the step donates it
            took[case].append(data.microseconds)
    for case in cases:
        pairs = list(zip(took[case], took["bare"], strict=True))
        yield {
            "workload": name,
            "case": case,
            "us_per_step": statistics.median(took[case]),
            "bare_us": statistics.median(took["bare"]),
            "ratio": statistics.median(peer / base for peer, base in pairs),
            "adds_us": statistics.median(peer - base for peer, base in pairs),
        }


def main(peer, version, cases):
    """Time a peer's cases and print one JSON object.

    Args:
        peer: its name.
        version: as installed.
        cases: the workload's name to a dict from a case to `run(step, state, data)`.
    """
    parser = argparse.ArgumentParser(description=f"Times {peer}.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [row for name in ("no-op", "W1", "W3") for row in compared(name, cases(name), rounds)]
    versions = {"version": version, "jax": jax.__version__, "python": platform.python_version()}
    print(json.dumps({"peer": peer, **versions, "rows": rows}))
