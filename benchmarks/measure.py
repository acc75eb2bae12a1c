"""How the benchmarks measure. Every round runs all cases in turn, so a slow moment of the machine affects
all of them. Results are medians over rounds of the ratio to the baseline of the same round.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable

import jax
import onstep


def pin(cores: int) -> str:
    """Pin this process to a number of cores if the system allows it, and return a description."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return f"{os.cpu_count()} cores"
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    return f"{os.cpu_count()} cores, pinned to {cores}"


def machine(cores: str) -> dict[str, str]:
    """Describe the machine and the versions."""
    device = jax.devices()[0]
    model = "".join(line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name"))
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{model or platform.machine()}, {cores}",
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}, onstep {onstep.__version__}",
    }


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().split("\n\n")[0].splitlines()
    except OSError:
        return []


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per step of every case in every round, after one extra round that compiles."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, measure in cases.items():
            seconds = measure()
            if number:
                times[name].append(seconds)
    return times


def figures(times: dict[str, list[float]], base: str) -> list[dict[str, float | str]]:
    """Return for each case the µs per step, the µs above the baseline, and the ratio to the baseline."""
    rows = []
    for name, found in times.items():
        pairs = list(zip(found, times[base], strict=True))
        rows.append(
            {
                "case": name,
                "us": statistics.median(found) * 1e6,
                "adds": statistics.median(mine - bare for mine, bare in pairs) * 1e6,
                "ratio": statistics.median(mine / bare for mine, bare in pairs),
            }
        )
    return rows
