"""Checkpoints of version 0.1 still resume: `data/make_v0_1.py` says how the one that is used here was made."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from onstep import Callback
from onstep.callbacks import EarlyStopping, NaNGuard, Progress, Report, Table
from onstep.snapshot import unpack
from onstep.storage import Checkpoints, load

SCRIPT = Path(__file__).parent / "data" / "make_v0_1.py"


@pytest.fixture(scope="module")
def made():
    """The script that made the data."""
    spec = importlib.util.spec_from_file_location("make_v0_1", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(made):
    return json.loads((made.DATA / "expected.json").read_text())


@pytest.fixture
def directory(made, tmp_path):
    """A copy of what version 0.1 wrote."""
    return Path(shutil.copytree(made.DATA, tmp_path / "v0_1"))


class Look(Callback):
    """Keep what the run holds right after it has resumed."""

    def __init__(self, made):
        self.made = made

    def on_run_begin(self, loop):
        self.step, self.start_step, self.latest = loop.step, loop.start_step, dict(loop.latest)
        self.position = loop.epoch, loop.epoch_step
        self.leaves = self.made.leaves({"state": loop.state, "carries": loop.carries})
        self.callbacks = {type(callback): callback for callback in loop.callbacks.values()}
        self.host = {kind: copy.deepcopy(callback.get_state()) for kind, callback in self.callbacks.items()}


def as_json(value):
    """Return a value as text, to compare NaN as well."""
    return json.dumps(value, default=np.ndarray.tolist)


def as_expected(made, expected, moment, leaves):
    """Check names, order, dtypes, shapes and bytes of leaves."""
    kinds = {name: kind for name, kind in expected["leaves"].items() if name.startswith(f"{moment}/")}
    assert {f"{moment}/{name}": made.describe(leaf) for name, leaf in leaves.items()} == kinds
    assert [f"{moment}/{name}" for name in leaves] == list(kinds)
    with np.load(made.DATA / "expected.npz") as arrays:
        wrong = [name for name, leaf in leaves.items() if arrays[f"{moment}/{name}"].tobytes() != leaf.tobytes()]
    assert wrong == []


def test_checkpoint_of_version_0_1_is_intact(directory):
    checkpoints = Checkpoints(directory / "run")
    assert checkpoints.steps() == [7]
    assert checkpoints.damage(7) is None
    assert checkpoints.best_step() == 7


def test_run_of_version_0_1_resumes_with_every_leaf_and_host_state(made, expected, directory):
    look = Look(made)
    saved = unpack(Checkpoints(directory / "run").host(7))
    made.run(directory, look)
    assert (look.step, look.start_step, look.position) == (7, 7, (1, 2))
    assert as_json(look.latest) == as_json(saved["latest"])
    as_expected(made, expected, "interrupted", look.leaves)
    host = saved["callbacks"]
    assert host.keys() == {"EarlyStopping", "NaNGuard", "Progress", "Report", "Table"}
    assert look.host[EarlyStopping] == host["EarlyStopping"] == {"best": 1.59375, "misses": 1}
    assert host["NaNGuard"] == {}
    assert look.host[Progress]["elapsed"] >= host["Progress"]["elapsed"] > 0
    assert look.host[Progress]["since"] == host["Progress"]["since"] == 0
    assert as_json(look.host[Report]["curves"]) == as_json(host["Report"]["curves"])
    assert look.host[Report]["sessions"] == host["Report"]["sittings"] + 1  # this one has begun
    assert look.host[Report]["seconds"] >= host["Report"]["seconds"] > 0
    assert as_json(look.host[Table]) == as_json(host["Table"])


def test_run_of_version_0_1_ends_in_the_same_bytes_and_records(made, expected, directory):
    look = Look(made)
    result = made.run(directory, look)
    assert (result.step, result.epoch, result.stopped) == (15, 3, None)
    as_expected(made, expected, "end", made.leaves(result.snapshot.tree))
    assert as_json(made.records(result)) == as_json(expected["records"])
    assert (directory / "records.csv").read_text() == expected["csv"]
    steps = [json.loads(line)["step"] for line in (directory / "records.jsonl").read_text().splitlines()]
    assert (steps[0], steps[-1], sorted(steps)) == (3, 15, steps)
    assert Checkpoints(directory / "run").steps() == [7, 15]
    page = (directory / "report.html").read_text()
    assert "2, the last from step 7" in page
    assert look.callbacks[NaNGuard].skipped(result) == 3


def test_load_reads_the_state_that_version_0_1_saved(made, expected, directory):
    state = load(directory / "run", made.initial_state())
    leaves = made.leaves({"state": state})
    with np.load(made.DATA / "expected.npz") as arrays:
        assert [name for name in leaves if arrays[f"interrupted/{name}"].tobytes() != leaves[name].tobytes()] == []
    assert jax.tree.structure(state) == jax.tree.structure(made.initial_state())
    assert load(directory / "run")["params"]["dense"]["w"].shape == (2, 4)
    assert list(Checkpoints(directory / "run").load(7)) == ["carries", "state"]
