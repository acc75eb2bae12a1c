"""Measure what the loops of other libraries add to a step, compared with a bare donated jit loop.

Run: python benchmarks/peers/run.py [--only keras,ignite] [--rounds 7] [--json FILE]

Each peer has its own virtual environment under .bench/, created at the first run from its pinned
requirements (about 11 GB for all of them; ciclo needs Python 3.11), and its own script, which runs on
one core if the system allows it. If a peer cannot be installed or does not run, its row says so. The
docstring of each script says what is comparable.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".bench"
PEERS = ("clu", "ignite", "ciclo", "tunix", "lightning", "keras", "kauldron")
MINUTES = 20  # limit for the installation and for the run of one peer


def call(*command):
    """Return the output of a command; if it fails, raise pip's error or the last line of the traceback."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES * 60)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(([line for line in lines if line.startswith("ERROR")] or lines)[-1])
    return done.stdout


def python_of(peer):
    """Return the interpreter of a peer's environment; create the environment if its requirements changed."""
    home, requirements = ENVIRONMENTS / peer, HERE / f"requirements-{peer}.txt"
    python, installed = home / "bin" / "python", home / "installed.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing {peer} into {home}", file=sys.stderr)
        call(sys.executable, "-m", "venv", "--clear", home)
        call(python, "-m", "pip", "install", "--quiet", "--requirement", requirements)
        installed.write_text(requirements.read_text())
    return python


def measured(peer, rounds):
    """Return the results of a peer, or the reason why there are none."""
    failing = "not installable"
    try:
        python = python_of(peer)
        failing = "does not run"
        return json.loads(call(python, HERE / f"{peer}_peer.py", "--rounds", str(rounds)).splitlines()[-1])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"peer": peer, "error": f"{failing}: {error}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda names: names.split(","), default=PEERS, help="comma-separated peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PEERS):
        parser.error(f"--only takes {','.join(PEERS)}, got {','.join(sorted(unknown))}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, pinned to one"
    print(f"{machine}; medians of {options.rounds} rounds\n")

    print(f"{'peer':<20}{'jax':<9}{'step':<7}{'case':<50}{'µs/step':>10}{'bare':>10}{'adds µs':>10}{'ratio':>8}")
    figures = []
    for peer in options.only:
        figures.append(found := measured(peer, options.rounds))
        name = f"{peer} {found.get('version', '')}"
        if "error" in found:
            print(f"{name:<20}{found['error']}")
        for row in found.get("rows", ()):
            ratio = f"{row['ratio']:8.2f}" if row["workload"] != "no-op" else ""
            times = f"{row['us_per_step']:10.2f}{row['bare_us']:10.2f}{row['adds_us']:10.2f}"
            print(f"{name:<20}{found['jax']:<9}{row['workload']:<7}{row['case']:<50}{times}{ratio}")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "peers": figures}, indent=1))
    sys.exit(all("error" in found for found in figures))


if __name__ == "__main__":
    main()
