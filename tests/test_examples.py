"""The first example, run as a user runs it."""

import re
import subprocess
import sys

import pytest
from models import EXAMPLES_FOLDER, files

pytestmark = pytest.mark.slow

EACH = pytest.mark.parametrize(
    ("script", "flags", "accuracy"),
    [pytest.param("digits.py", ["--fast"], 0.95, id="digits")],
)


def run(script, flags, directory):
    command = [sys.executable, str(EXAMPLES_FOLDER / script), *flags, "--directory", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


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
    assert f"below the target of {accuracy}" in short.stdout
