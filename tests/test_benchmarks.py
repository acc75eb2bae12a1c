"""The benchmarks in their shortest form: they run and print the expected tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *flags):
    done = subprocess.run([sys.executable, BENCHMARKS / script, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_loops_are_timed_in_tables_json_and_a_plot(tmp_path):
    printed = run("run.py", "--quick", "--only", "W1", "--out", str(tmp_path))
    (found,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    rows = {row["case"]: row["ratio"] for row in found["workloads"]["W1"]}
    assert rows["bare jit loop"] == 1.0
    assert {"onstep, auto", "lax.scan of 100 steps", "usual callbacks, careful loop"} < rows.keys()
    assert all(case in printed for case in rows)
    assert [path.stat().st_size > 10_000 for path in tmp_path.glob("*.png")] == [True]


def test_overhead_of_the_engine_is_timed():
    assert "10 callbacks, 2 act every 100 steps" in run("overhead.py", "--rounds", "1")


def test_long_run_compiles_only_what_it_logs_and_leaves_no_array_behind():
    printed = run("limits.py", "--steps", "15000")
    assert "compilations: 1 before step 100, 0 afterwards" in printed
    assert "logged: ['compiled the step, up to 128 steps a call" in printed
    (live,) = (line for line in printed.splitlines() if line.startswith("live arrays"))
    assert live.count(",") == 0  # the same number every time


def test_many_devices_are_timed_and_the_engine_adds_no_collective(tmp_path):
    printed = run("mesh.py", "--quick", "--out", str(tmp_path))
    (found,) = (json.loads(path.read_text()) for path in tmp_path.glob("mesh-*.json"))
    for name, cases in found["collectives"].items():
        assert cases["onstep"] == cases["by hand"], name
        assert cases["by hand"]["all-reduce"] > 0
        assert [row["ratio"] for row in found["steps"][name] if "by hand: device_put" in row["case"]] == [1.0]
    assert found["agreement us"]["2"] > 0
    assert "agreement of 2 processes" in printed


def test_observers_change_no_state_and_their_isolation_is_timed():
    printed = run("observers.py", "--short")
    assert "0 of 8 states differ" in printed
    assert printed.count("W1 one layer, blocks") == 2


def test_removed_protections_are_noticed():
    printed = run("mutations.py", "--short")
    assert printed.count("noticed by test_") == 3
    assert "0 of 3 mutations survived" in printed
