"""Compare the engine with a bare donated jit loop and with hand-written loops.

Run: python benchmarks/run.py [--only W1,W3] [--cases auto,scan] [--steps N] [--rounds 7] [--cores 1]
         [--quick] [--out DIR]

Prints one table per workload; "saves" are completed checkpoints. --out also saves the results as JSON and as a plot,
named by date and device.
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


def counting(loops, saves, name, case):
    """Return a case that notes how many saves it has completed."""

    def measure():
        loops.saves = 0
        seconds = case()
        saves[name] = loops.saves
        return seconds

    return measure


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
        saves = {}
        counted = {case: counting(loops, saves, case, measure) for case, measure in chosen.items()}
        try:
            found[name] = [row | {"saves": saves[row["case"]]} for row in figures(interleaved(counted, rounds), BARE)]
        finally:
            loops.close()
        jax.clear_caches()
        print(f"\n{workload.name}, {loops.steps} steps{'µs/step':>37}{'ratio':>8}{'saves':>8}")
        for row in found[name]:
            print(f"  {row['case']:<48}{row['us']:12.1f}{row['ratio']:8.2f}{row['saves'] or '':>8}", flush=True)
    if options.out:
        save(options.out, about | {"rounds": rounds}, found)


def save(folder, about, found):
    """Save the results as JSON and as a plot, named by device and date."""
    stem = os.path.join(folder, f"{about['device'].replace(' ', '-')}-{about['date']}")
    os.makedirs(folder, exist_ok=True)
    with open(f"{stem}.json", "w") as file:
        json.dump(about | {"workloads": found}, file, indent=1)
    draw(found, f"{stem}.png")


TITLES = {
    "W1": "One layer, batch 8",
    "W3": "MLP 3x256, batch 128",
    "CNN": "CNN, batch 32",
    "transformer": "4-layer transformer",
    "leaves": "A state of 256 leaves",
}
SHOWN = {
    "lax.scan of 100 steps": "lax.scan",
    "onstep, auto": "onstep",
    "onstep, 1 step a call, ready batches": "onstep, one step a call",
    "usual callbacks, naive loop": "callbacks, naive loop",
    "usual callbacks, careful loop": "callbacks, careful loop",
    "usual callbacks, onstep, auto": "callbacks, onstep",
}
"""The cases of the plot, without callbacks and then with the usual ones, and their labels."""


def draw(found, path):
    """Draw the ratios of each workload below each other, so that the labels can be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 0.3 + 1.75 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        ratios = {row["case"]: row["ratio"] for row in rows}
        shown = [case for case in SHOWN if case in ratios] or list(ratios)
        # A gap between the groups.
        places = [index + 0.6 * case.startswith("usual") for index, case in enumerate(shown)]
        colors = ["#2a78d6" if "onstep" in case else "#b5b5b5" for case in shown]
        bars = panel.barh(places, [ratios[case] for case in shown], 0.8, color=colors)
        numbers = [f"{ratios[case]:.{0 if ratios[case] > 10 else 2}f}" for case in shown]
        panel.bar_label(bars, numbers, padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.set_yticks(places, [SHOWN.get(case, case) for case in shown])
        panel.set_title(f"{TITLES.get(name, name)} ({rows[0]['us']:,.0f} µs a step)", loc="left", fontsize="medium")
        panel.axvline(1, color="0.3", linewidth=0.8, zorder=0.5)
        panel.set(xscale="log", xlim=(0.03, 60))
        panel.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        panel.invert_yaxis()
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("time per step / bare jit loop (shorter is better)", fontsize="medium")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
