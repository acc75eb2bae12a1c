"""Measure what Fingerprint and RepeatStep cost.

Run: python benchmarks/fingerprint.py [--short]

Every case is a run of the MLP of the other benchmarks, with one step per call ("plain") and in blocks of 50. The ratios
are medians of rounds, in each of which all cases run in turn.
"""

from __future__ import annotations

import argparse
import logging
import os
import time

import jax
from measure import figures, interleaved, machine
from onstep import Engine
from onstep.callbacks import Fingerprint, RepeatStep
from workloads import digits_mlp, one_layer

CASES = {
    "no callback": list,
    "Fingerprint(50)": lambda: [Fingerprint(50)],
    "Fingerprint(1)": lambda: [Fingerprint(1)],
    "RepeatStep(1000)": lambda: [RepeatStep(1000)],
}


def timed(workload, callbacks, steps_per_call, steps):
    """Return a case: a run of the engine."""
    size = workload.batch_size
    rows = [slice(n * size, (n + 1) * size) for n in range(len(workload.arrays["x"]) // size)]
    batches = [{name: array[row] for name, array in workload.arrays.items()} for row in rows]
    data = [batches[n % len(batches)] for n in range(steps)]
    engine = Engine(workload.step, callbacks, log_every=steps, steps_per_call=steps_per_call)

    def measure():
        start = time.perf_counter()
        jax.block_until_ready(engine.run(workload.state, data, epochs=1).state)
        return (time.perf_counter() - start) / steps

    return measure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a small model and few steps, to test this script")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    logging.getLogger("onstep").disabled = True
    print("; ".join(machine(f"{os.cpu_count()} cores").values()))
    workload, steps, rounds = digits_mlp(), options.steps, options.rounds
    if options.short:
        workload, steps, rounds = one_layer(), 500, 1
    print(f"{workload.name}, {steps} steps, medians of {rounds} rounds")
    print(f"{'':<28}{'µs a step':>10}{'ratio':>8}")
    for mode, steps_per_call in (("plain", 1), ("blocks", 50)):
        cases = {name: timed(workload, callbacks(), steps_per_call, steps) for name, callbacks in CASES.items()}
        for row in figures(interleaved(cases, rounds), "no callback"):
            print(f"{mode + ', ' + row['case']:<28}{row['us']:10.1f}{row['ratio']:8.3f}", flush=True)


if __name__ == "__main__":
    main()
