"""The examples, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
EACH = pytest.mark.parametrize(
    ("script", "flags", "accuracy"),
    [pytest.param("digits.py", ["--fast"], 0.95, id="digits")],
)


def run(script, flags, directory):
    command = [sys.executable, str(EXAMPLES / script), *flags, "--directory", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def files(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@EACH
def test_example_reaches_its_accuracy_and_a_second_start_does_nothing(script, flags, accuracy, tmp_path):
    first = run(script, flags, tmp_path / "run")
    assert first.returncode == 0, first.stderr
    assert not re.search("Warning|Error|Traceback", first.stderr), first.stderr
    reached = re.search(r"^held-out accuracy  (\d\.\d+)$", first.stdout, re.MULTILINE)
    assert float(reached[1]) >= accuracy
    before = files(tmp_path / "run")
    assert tmp_path / "run" / script.replace(".py", ".png") in before

    second = run(script, flags, tmp_path / "run")
    assert second.returncode == 0, second.stderr
    assert "nothing to do" in second.stderr
    assert reached[0] in second.stdout.splitlines()
    assert files(tmp_path / "run") == before


@EACH
def test_example_below_its_target_exits_with_status_1(script, flags, accuracy, tmp_path):
    short = run(script, [*flags, "--epochs", "1"], tmp_path / "run")
    assert short.returncode == 1, short.stderr
    assert f"short of {accuracy}" in short.stdout
