"""The examples with several networks: run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("script", ["gan", "vae", "target_network", "mean_teacher"])
def test_an_example_passes_its_own_check(script, tmp_path):
    command = [sys.executable, EXAMPLES / f"{script}.py", "--fast", "--directory", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "short of" not in done.stdout
    assert not re.search("Warning|Error|Traceback", done.stderr), done.stderr
    if script != "mean_teacher":
        assert [path for path in (tmp_path / "run").glob("*.png") if path.stat().st_size > 10_000]
