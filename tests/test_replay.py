"""Replays: a past step as it was, from the checkpoints of the run, without changing a file."""

import json
import os
import runpy
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Batches, Callback, Engine, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GradNorm, JSONLines, NaNGuard, TensorBoard
from onstep.cli import main
from onstep.testing import FakeLoader

DATA = np.arange(1, 41, dtype=np.float32)


class Recorder(Callback):
    """Keeps what every step received and returned. It comes last, so it sees what other callbacks changed."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_step_begin(self, loop):
        self.before[loop.step + 1] = host((loop.state, loop.carries, loop.batch))

    def on_step_end(self, loop):
        self.after[loop.step] = host((loop.state, dict(loop.metrics)))


def host(tree):
    return jax.tree.map(np.array, tree)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(directory):
    """Return every file of a directory with its bytes and the time of its last change, and every folder."""
    found = {}
    for folder, _, names in os.walk(directory):
        found[folder] = os.stat(folder).st_mtime_ns
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[path] = file.read(), os.stat(path).st_mtime_ns
    return found


def step(state, batch, rng):
    def loss(w):
        return ((w * batch["x"]) ** 2).mean() + 1e-3 * jax.random.normal(rng)

    value, grads = jax.value_and_grad(loss)(state["w"])
    return {"w": state["w"] - 1e-4 * grads}, {"loss": value}, {"grads": grads}


START = {"w": jnp.float32(1)}


class Decay(Callback):
    """Changes the state between steps, by what another callback recorded."""

    when = every(6)

    def on_step_end(self, loop):
        loop.state = {"w": loop.state["w"] * (0.5 + 0 * loop.latest.get("val/loss", 0))}


class Noise(Callback):
    """Replaces batches, with a generator that is saved and restored."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def on_step_begin(self, loop):
        loop.batch = {"x": loop.batch["x"] + self.generator.normal(size=4).astype(np.float32)}

    def get_state(self):
        state = self.generator.bit_generator.state
        return {"state": str(state["state"]["state"]), "inc": str(state["state"]["inc"])}

    def set_state(self, state):
        inner = {"state": int(state["state"]), "inc": int(state["inc"])}
        self.generator.bit_generator.state = {"bit_generator": "PCG64", "state": inner, "has_uint32": 0, "uinteger": 0}


def rows(epoch):
    for start in range(0, 40, 4):
        yield {"x": DATA[start : start + 4] + epoch}


class Sized:
    """A callable whose epochs have a length."""

    def __call__(self, epoch):
        return list(rows(epoch))


SOURCES = {
    "Batches": lambda: Batches({"x": DATA}, 4, seed=3),
    "list": lambda: list(rows(0)),
    "callable": lambda: Sized(),
    "generator": lambda: (row for epoch in range(9) for row in rows(epoch)),
    "loader": lambda: FakeLoader(list(rows(0))),
}
EXTRA = {
    "observers": lambda: [],
    "state changed": lambda: [Evaluate(lambda s, b: {"loss": s["w"] * b["x"].mean()}, list(rows(0)), when=6), Decay()],
    "batch changed": lambda: [Noise()],
}


def usual(directory, extra, *more):
    return [EMA(0.9, of="w"), GradNorm(when=3), NaNGuard(when=5), *extra, Checkpoint(directory, when=7, keep=9), *more]


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("extra", EXTRA)
def test_every_replayed_step_has_the_bytes_of_the_run(steps_per_call, source, extra, tmp_path):
    recorder, key = Recorder(), jax.random.key(1)
    target = {"steps": 24, "epoch_steps": 10 if source == "generator" else None}
    new = partial(Engine, step, log_every=4, steps_per_call=steps_per_call)
    new(callbacks=usual(tmp_path, EXTRA[extra](), recorder)).run(START, SOURCES[source](), rng=key, **target)
    before = files(tmp_path)
    for number in (1, 8, 12, 24):
        engine = new(
            callbacks=usual(tmp_path, EXTRA[extra](), JSONLines(tmp_path / "log"), TensorBoard(tmp_path / "tb"))
        )
        moment = engine.replay(START, SOURCES[source](), tmp_path, step=number, rng=key, **target)
        assert moment.checkpoint == {1: None, 8: 7, 12: 7, 24: 21}[number]
        same((moment.state, moment.carries, moment.batch), recorder.before[number])
        state, metrics, aux = moment.run()
        assert set(aux) == {"grads"}
        if extra != "state changed" or number % 6:
            same((state, metrics), recorder.after[number])
        assert set(moment.run(jit=False)[1]) == set(metrics)
        assert moment.first_bad() is None
    assert files(tmp_path) == before


def test_step_beyond_the_run_is_refused(tmp_path):
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path, when=2)])
    engine.run(0, [1, 2, 3], epochs=2)
    with pytest.raises(ValueError, match="needs a step of the run, got 7; the run ends at step 6"):
        engine.replay(0, [1, 2, 3], tmp_path, step=7, steps=6)
    with pytest.raises(ValueError, match="needs a step of the run, got 7; the run ended at step 6"):
        engine.replay(0, [1, 2, 3], tmp_path, step=7, epochs=2)
    with pytest.raises(ValueError, match="needs step to be a whole number >= 1, got 0"):
        engine.replay(0, [1, 2, 3], tmp_path, step=0, epochs=2)


def test_range_of_steps_is_replayed_in_one_go(tmp_path):
    recorder = Recorder()
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path, when=3), recorder])
    engine.run(jnp.int32(0), range(10), epochs=1)
    moments = list(engine.replay(jnp.int32(0), range(10), tmp_path, step=range(5, 9), epochs=1))
    assert [moment.step for moment in moments] == [5, 6, 7, 8]
    for moment in moments:
        same((moment.state, moment.carries, moment.batch), recorder.before[moment.step])
        assert int(moment.run()[0]) == sum(range(moment.step))


def test_damaged_checkpoints_are_passed_over(tmp_path):
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path, when=2, keep=9)])
    engine.run(jnp.int32(0), range(10), epochs=1)
    (tmp_path / "6" / "host.npz").write_bytes(b"")
    assert engine.replay(jnp.int32(0), range(10), tmp_path, step=8, epochs=1).checkpoint == 4


def test_run_whose_loop_body_changed_the_state_cannot_be_replayed(tmp_path):
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path, when=2)])
    with engine.steps(jnp.int32(0), range(10), epochs=1, when=2) as steps:
        for loop in steps:
            loop.state = loop.state * 2
    with pytest.raises(RuntimeError, match="changed in the body of `for loop in engine.steps"):
        engine.replay(jnp.int32(0), range(10), tmp_path, step=5, epochs=1)


SCRIPT = """
import sys
import jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint, NaNGuard

def loss_fn(w, x):
    return jnp.log(w - x)

def step(w, x):
    return w - 1, {"loss": loss_fn(w, x)}

print("arguments", sys.argv[1:])
engine = Engine(step, [NaNGuard(when=4), Checkpoint("run", when=4)])
engine.run(jnp.float32(9), [1.0] * 12, epochs=1)
print("not reached")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(FloatingPointError, match="non-finite loss at step 9 "):
        runpy.run_path("train.py", run_name="__main__")
    return tmp_path


def test_command_replays_the_step_of_an_unmodified_script(script, capsys):
    capsys.readouterr()
    before = files(script / "run")
    assert main(["replay", "--step", "9", "train.py", "--lr", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "arguments ['--lr', '3']"
    assert lines[1:] == [
        "step 9, from checkpoint 8: not finite: loss",
        "first bad operation: log at train.py:8 (loss_fn)",
        "  in   float32[], 0",
        "  out  float32[], 1 of 1 is -inf",
    ]
    assert files(script / "run") == before


def test_command_says_that_a_step_is_finite(script, capsys):
    capsys.readouterr()
    assert main(["replay", "--step", "8", "--run", "run", "train.py"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["step 8, from checkpoint 4: all results are finite", "loss 0"]


def test_command_gives_json(script, capsys):
    capsys.readouterr()
    assert main(["replay", "--json", "--step", "9", "train.py"]) == 0
    found = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (found["step"], found["checkpoint"], found["bad"], found["first"]["operation"]) == (9, 8, ["loss"], "log")


def test_command_for_another_directory_replays_no_run(script, capsys):
    with pytest.raises(FloatingPointError):
        main(["replay", "--step", "9", "--run", "elsewhere", "train.py"])


def test_checkpoints_are_shown_and_verified(script, capsys):
    capsys.readouterr()
    assert main(["show", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "4", "8", "NaNGuard:"]
    assert main(["verify", "run"]) == 0
    (script / "run" / "4" / "host.npz").write_bytes(b"")
    assert main(["verify", "run"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "4: intact"
    assert shown[2].startswith("4: host.npz ")
    assert main(["verify", "nothing"]) == 1
