"""Compare the engine with a bare donated jit loop and with hand-written loops.

Run: python benchmarks/run.py [--only W1,W3] [--cases auto,scan] [--steps N] [--rounds 7] [--cores 1]
         [--quick] [--out DIR]

Prints one table per workload. --out also saves the results as JSON and as a plot, named by date and device.
"""

import argparse
import json
import logging
import os
import warnings

import jax
from loops import EveryStep, Loops
from measure import figures, interleaved, machine, pin
from workloads import WORKLOADS

BARE = "bare jit loop"


def cases(loops):
    """Return the loops over one workload, by name."""
    return {
        BARE: loops.bare,
        "lax.scan of 100 steps": loops.scan,
        "onstep, 1 step a call, ready batches": loops.onstep(ready=True, steps_per_call=1),
        "onstep, 1 step a call": loops.onstep(steps_per_call=1),
        "onstep, auto": loops.onstep(steps_per_call="auto"),
        "onstep, a callback at every step, 1 step a call": loops.onstep(more=[EveryStep()], steps_per_call=1),
        "onstep, a callback at every step, auto": loops.onstep(more=[EveryStep()]),
        "usual callbacks, naive loop": loops.naive,
        "usual callbacks, careful loop": loops.by_hand,
        "usual callbacks, onstep, 1 step a call": loops.onstep(usual=True, steps_per_call=1),
        "usual callbacks, onstep, auto": loops.onstep(usual=True),
        "the same without checkpoints": loops.onstep(usual=True, saves=False),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(WORKLOADS), help="comma-separated workloads")
    parser.add_argument("--cases", default="", help="comma-separated words; run only cases that contain one")
    parser.add_argument("--steps", type=int, help="steps per measurement; by default set by the workload")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", type=int, default=1, help="number of cores to pin the process to; 0 for all")
    parser.add_argument("--quick", action="store_true", help="few steps and one round, to check that the script runs")
    parser.add_argument("--out", help="folder for the results as JSON and a plot")
    options = parser.parse_args()
    logging.getLogger("onstep").disabled = True
    warnings.filterwarnings("ignore", "EarlyStopping watches")  # epochs are shorter than its cadence
    about = machine(pin(options.cores))
    rounds = 1 if options.quick else options.rounds
    print("; ".join(about.values()), f"; medians of {rounds} rounds", sep="")
    found = {}
    for name in options.only.split(","):
        workload = WORKLOADS[name]()
        loops = Loops(workload, 200 if options.quick else options.steps or workload.steps)
        chosen = {n: c for n, c in cases(loops).items() if n == BARE or any(w in n for w in options.cases.split(","))}
        try:
            found[name] = figures(interleaved(chosen, rounds), BARE)
        finally:
            loops.close()
        jax.clear_caches()
        print(f"\n{workload.name}, {loops.steps} steps{'µs/step':>37}{'ratio':>8}")
        for row in found[name]:
            print(f"  {row['case']:<48}{row['us']:12.1f}{row['ratio']:8.2f}", flush=True)
    if options.out:
        save(options.out, about | {"rounds": rounds}, found)


def save(folder, about, found):
    """Save the results as JSON and as a plot, named by device and date."""
    from matplotlib.figure import Figure

    stem = os.path.join(folder, f"{about['device'].replace(' ', '-')}-{about['date']}")
    os.makedirs(folder, exist_ok=True)
    with open(f"{stem}.json", "w") as file:
        json.dump(about | {"workloads": found}, file, indent=1)
    figure = Figure(figsize=(4 + 3.4 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        ratios = [row["ratio"] for row in rows][::-1]
        colors = ["C1" if "onstep" in row["case"] or "same" in row["case"] else "0.6" for row in rows][::-1]
        bars = panel.barh([row["case"] for row in rows][::-1], ratios, color=colors)
        panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        panel.axvline(1, color="0.3", linewidth=0.8)
        panel.set(xscale="log", title=name, xlabel="time per step / bare jit loop", xlim=(0.03, 60))
    figure.savefig(f"{stem}.png", dpi=130)


if __name__ == "__main__":
    main()
