"""Two runs compared: by their checkpoints, their records, their fingerprints, and replays of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine
from onstep.callbacks import EMA, Checkpoint, Fingerprint
from onstep.compare import Difference, Parting, compare_runs, find_parting
from onstep.storage import Checkpoints, orbax_trees
from onstep.testing import same_bytes

DATA = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
DATA[:, 2] = np.arange(40) == 16  # so that no rounding hides a change of its last bit
KEY = jax.random.key(0)
START = {
    "w": jnp.zeros(4),
    "noise": jnp.zeros(2),
    "half": jnp.ones(3, jnp.bfloat16),
    "key": jax.random.key(5),
    "empty": jnp.zeros((2, 0)),
    "nan": jnp.full(2, jnp.nan),
    "opt_state": (jnp.int32(0),),
}


def stepping(rate):
    def step(state, batch, rng):
        new = {"w": state["w"] + rate * batch, "noise": jax.random.normal(rng, (2,)), "half": state["half"] * 0.5}
        opt_state = (state["opt_state"][0] + 1,)
        return {**state, **new, "opt_state": opt_state}, {"loss": (new["w"] ** 2).sum(), "ratio": jnp.nan}

    return step


class Run:
    """A run of 40 steps that is saved every ten; each argument may differ from that of another run."""

    def __init__(self, *callbacks, data=DATA, rate=0.5, key=KEY, start=START, steps=40):
        self.callbacks, self.data, self.rate, self.key, self.start, self.steps = (
            callbacks,
            data,
            rate,
            key,
            start,
            steps,
        )

    def engine(self, directory):
        saves = Checkpoint(directory, when=10, keep=9)
        return Engine(stepping(self.rate), [*self.callbacks, saves], log_every=5)

    def save(self, directory):
        self.engine(directory).run(self.start, list(self.data), steps=self.steps, rng=self.key)
        return directory

    def checksums(self, directory, steps):
        engine = self.engine(directory)
        moments = engine.replay(self.start, list(self.data), directory, step=steps, steps=self.steps, rng=self.key)
        return {moment.step: moment.checksums() for moment in moments}


def changed(data, at):
    """Return the data with the last bit of one number changed."""
    data = data.copy()
    data[at, 2] = np.nextafter(data[at, 2], np.float32(9))
    return data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a run with the default arguments."""
    return Run(Fingerprint(1)).save(tmp_path_factory.mktemp("runs") / "a")


OTHERS = {
    "nothing": {},
    "batch": {"data": changed(DATA, 16)},
    "key": {"key": jax.random.key(1)},
    "optimizer": {"rate": 0.25},
    "state": {"start": START | {"w": jnp.zeros(4).at[2].set(1)}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_two_runs_are_compared_to_the_step_and_the_leaf(what, saved, tmp_path):
    other = Run(Fingerprint(1), **OTHERS[what])
    if what == "nothing":  # not even that one of them was interrupted
        Run(Fingerprint(1), steps=17).save(tmp_path / "b")
    found = compare_runs(saved, other.save(tmp_path / "b"))
    assert found.equal == (what == "nothing")
    assert found.key == (what == "key")
    assert list(found.configuration) == ["the program of the compiled step"] * (what == "optimizer")
    if found.equal:
        assert other.callbacks[0].get_state()["fingerprint_steps"].tolist() == [*range(1, 41)]
        assert str(found) == "fingerprints: equal up to step 40\ncheckpoints: equal up to step 40"
        return
    first, leaf = {"batch": (20, "state/w"), "key": (10, "state/noise")}.get(what, (10, "state/w"))
    assert (found.checkpoints.equal_until, found.checkpoints.differs_at) == (first - 10 or None, first)
    assert {name for name in found.checkpoints.what if name.startswith("state/")} == {leaf}
    differs = {"batch": (16, 17, ["batch", "state"])}.get(what, (None, 1, ["state"]))  # step 17 takes batch 16
    assert (found.fingerprints.equal_until, found.fingerprints.differs_at, list(found.fingerprints.what)) == differs
    steps = range(first - 9, first + 1)
    runs = ((Run(Fingerprint(1)), saved), (other, tmp_path / "b"))
    parting = find_parting(*(run.checksums(directory, steps) for run, directory in runs), found.checkpoints)
    received = {"batch": (17, ["batch"]), "key": (1, ["rng"]), "state": (1, ["state/w"])}
    if what in received:
        assert parting == Parting(*received[what], [])
    else:
        assert (parting.step, parting.received) == (1, [])
        assert "state/w" in parting.returned
    if what == "batch":
        assert found.checkpoints.what["state/w"] == "1 of 4 differs, by up to 5.96e-08"


def test_step_whose_result_is_the_first_to_differ_is_the_last_one_before_a_checkpoint():
    checkpoints = Difference(10, 20, {"state/w": "1 of 4 differs"})
    equal = {step: {"state/w": 1} for step in range(11, 21)}
    assert find_parting(equal, equal, checkpoints) == Parting(20, [], ["state/w"])
    assert find_parting(equal, equal, Difference(20, None, {})) is None


class Watch(Callback):
    def __init__(self, n, path):
        self.n, self.path = n, path


def test_configuration_is_compared_without_the_name_of_the_directory(tmp_path):
    runs = {
        name: Run(Watch(1, f"runs/{name}"), Watch(n, name), EMA(1 - n / 10, of="w")) for n, name in ((1, "a"), (2, "b"))
    }
    found = compare_runs(*(run.save(tmp_path / name) for name, run in runs.items()))
    assert found.configuration["Watch_2"] == "Watch(1, 'DIRECTORY') and Watch(2, 'DIRECTORY')"
    assert found.configuration["EMA"] == "EMA(decay=0.9, of='w') and EMA(decay=0.8, of='w')"
    assert "Watch" not in found.configuration
    assert not found.equal


def test_other_trees_lengths_and_steps(saved, tmp_path):
    other = Run(start=START | {"half": jnp.ones(5, jnp.bfloat16), "more": jnp.zeros(2)}, steps=20)
    found = compare_runs(saved, other.save(tmp_path / "tree")).checkpoints
    assert (found.equal_until, found.differs_at) == (None, 10)
    assert found.what["state/half"] == "bfloat16[3] and bfloat16[5]"
    assert found.what["state/more"] == "only in one of the runs"
    assert "state/w" not in found.what
    Run(steps=20).save(tmp_path / "short")
    (tmp_path / "short" / "10" / "host.npz").write_bytes(b"")
    found = compare_runs(saved, tmp_path / "short")
    assert [damage.partition(",")[0] for damage in found.damaged.values()] == ["host.npz has 0 bytes"]
    assert (found.checkpoints.equal_until, found.checkpoints.differs_at) == (None, 20)  # the carry of Fingerprint
    assert list(found.checkpoints.what) == ["carries/Fingerprint"]
    Run(steps=7).save(tmp_path / "seven")
    with pytest.raises(ValueError, match=r"no checkpoint, record or fingerprint of the same step.*\[10, .*and \[7\]"):
        compare_runs(saved, tmp_path / "seven")
    with pytest.raises(ValueError, match="has no intact checkpoint to compare"):
        compare_runs(saved, tmp_path / "nothing")


def test_records_are_compared_without_times_and_nan_is_equal_to_itself(saved):
    same = {5: {"train/loss": float("nan"), "time/data": 0.1}, 10: {"time/data": 0.2}}
    assert compare_runs(saved, saved, (same, same | {5: {"train/loss": float("nan")}})).records == Difference(
        5, None, {}
    )
    found = compare_runs(saved, saved, (same, {5: {"train/loss": 0.5}}))
    assert found.records == Difference(None, 5, {"train/loss": "nan and 0.5"})
    assert str(found).startswith("records: different at step 5:\n  train/loss: nan and 0.5\n")


def test_arrays_of_a_checkpoint_are_read_in_parts(saved, monkeypatch):
    checkpoints = Checkpoints(saved)
    names = ["state/w", "state/key", "state/half", "carries/Fingerprint", "state/opt_state/0"]
    whole = dict(checkpoints.arrays(40, names))
    assert whole["state/half"].dtype == jnp.bfloat16
    assert same_bytes(whole["state/key"], np.asarray(jax.random.key_data(START["key"])))
    monkeypatch.setattr(orbax_trees, "MOST_BYTES", 1)
    parts = list(checkpoints.arrays(40, names))
    assert [name for name, _ in parts] == names
    assert same_bytes(dict(parts), whole)
    with pytest.raises(KeyError):
        list(checkpoints.arrays(40, ["state/typo"]))
