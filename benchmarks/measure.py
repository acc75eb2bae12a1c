"""How figures are taken: cases one after the other in every round, so that a slow moment of the
machine meets all of them; medians over rounds of the ratio with the baseline of the same round.
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
    """Keeps this process on so many cores, where the system allows it; says what came of it."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return f"{os.cpu_count()} cores"
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    return f"{os.cpu_count()} cores, pinned to {cores}"


def machine(cores: str) -> dict[str, str]:
    """What the figures were taken on."""
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
    """Seconds a step of every case in every round; one round more comes first, which compiles."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, measure in cases.items():
            seconds = measure()
            if number:
                times[name].append(seconds)
    return times


def figures(times: dict[str, list[float]], base: str) -> list[dict[str, float | str]]:
    """By case: µs a step, µs more than the baseline, and the ratio with it."""
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
