"""Two runs compared: by their checkpoints, their fingerprints, and both of their scripts."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine
from onstep.callbacks import Checkpoint, Fingerprint
from onstep.callbacks.fingerprint import _hash
from onstep.cli import main
from onstep.compare import compare_runs

DATA = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


def step(state, batch):
    update = state["w"] + batch
    return {"w": update, "n": state["n"] + 1}, {"loss": (update**2).sum()}


def run(directory, data=DATA, callbacks=(), rng=None, step=step, steps=40):
    start = {"w": jnp.zeros(4), "n": jnp.int32(0)}
    engine = Engine(step, [*callbacks, Checkpoint(directory, when=10, keep=9)], log_every=5)
    return engine.run(start, list(data), steps=steps, rng=rng)


def changed(at, by=1e-3):
    """Return the data with one number changed; by=0 changes its last bit."""
    data = DATA.copy()
    data[at, 2] = data[at, 2] + by if by else np.nextafter(data[at, 2], np.float32(9))
    return data


def test_equal_runs_have_no_difference(tmp_path):
    for name in "ab":
        run(tmp_path / name, callbacks=[Fingerprint(7)])
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.equal
    assert (found.equal_until, str(found)) == (40, "the checkpoints are equal up to step 40")


def test_first_checkpoint_and_the_leaves_that_differ_are_named(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", changed(16))
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (found.equal_until, found.differs_at, list(found.leaves)) == (10, 20, ["state/w"])
    assert found.leaves["state/w"].startswith("1 of 4 differs, by up to ")


@pytest.mark.parametrize("when", [1, 5])
def test_fingerprint_tells_the_step_and_whether_the_batch_or_the_state_differed_first(when, tmp_path):
    run(tmp_path / "a", callbacks=[Fingerprint(when)])
    run(tmp_path / "b", changed(16, by=0 if when == 1 else 1e-3), callbacks=[Fingerprint(when)])
    found = compare_runs(tmp_path / "a", tmp_path / "b").fingerprint
    assert found == ((17, "batch") if when == 1 else (20, "state"))  # step 17 takes batch 16


def test_changed_callback_key_and_step_are_named(tmp_path):
    class Watch(Callback):
        def __init__(self, n):
            self.n = n

    run(tmp_path / "a", callbacks=[Watch(1)], rng=jax.random.key(0))
    run(tmp_path / "b", callbacks=[Watch(2)], rng=jax.random.key(1), step=lambda s, b: step(s, 2 * b))
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.configuration["Watch"] == ("Watch(1)", "Watch(2)")
    assert "the compiled step" in found.configuration
    assert found.key


def test_runs_without_a_common_step_are_refused(tmp_path):
    run(tmp_path / "a", steps=5)
    run(tmp_path / "b", steps=7)
    with pytest.raises(ValueError, match="no checkpoint of the same step: .5. and .7."):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_command_exits_with_1_if_the_runs_differ(tmp_path, capsys):
    run(tmp_path / "a")
    run(tmp_path / "b", changed(16))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    assert (found["equal"], found["differs_at"]) == (False, 20)


SCRIPT = """
import sys
sys.path.insert(0, FOLDER)
from test_compare import DATA, changed, run
run(sys.argv[1], changed(16) if "changed" in sys.argv else DATA)
"""


@pytest.mark.slow
def test_command_finds_the_exact_step_with_both_scripts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT.replace("FOLDER", repr(str(Path(__file__).parent))))
    for arguments in (["a"], ["b", "changed"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        runpy.run_path("train.py", run_name="__main__")
    assert main(["diff", "a", "b", "--scripts", "train.py a", "train.py b changed"]) == 1
    assert capsys.readouterr().out.endswith("step 17 is the first that received other values: batch\n")


# Fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool", "complex64"])
def test_every_bit_of_every_type_changes_the_hash(dtype):
    raw = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, 64, dtype=np.uint8)
    array = raw.view(jnp.dtype(dtype))
    hashes = [int(_hash({"x": jnp.asarray(array)}))]
    for position in range(0, raw.size, 7):
        other = raw.copy()
        other[position] ^= 1
        hashes.append(int(_hash({"x": jnp.asarray(other.view(array.dtype))})))
    assert len(set(hashes)) == len(hashes)


def test_equal_leaves_in_other_places_have_another_hash():
    one, two = jnp.arange(3.0), jnp.ones(3)
    assert int(_hash((one, two))) != int(_hash((two, one)))
    assert int(_hash((one,))) != int(_hash((one[::-1],)))


def test_fingerprints_continue_when_a_run_resumes(tmp_path):
    whole, parts = Fingerprint(3), Fingerprint(3)
    run(tmp_path / "a", callbacks=[whole])
    run(tmp_path / "b", callbacks=[Fingerprint(3)], steps=17)
    run(tmp_path / "b", callbacks=[parts])
    for name, kept in whole.get_state().items():
        assert kept.tolist() == parts.get_state()[name].tolist()
