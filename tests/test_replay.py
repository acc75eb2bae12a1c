"""Replays: a past step as it was, from the checkpoints of the run, without changing a file."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import contents_below
from onstep import Batches, Callback, Engine, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GradNorm, JSONLines, NaNGuard, Profiler, TensorBoard
from onstep.sharding import make_mesh
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


PAIRS = [(1 if (i + j) % 2 else 8, s, e) for i, s in enumerate(SOURCES) for j, e in enumerate(EXTRA)]


@pytest.mark.parametrize(("steps_per_call", "source", "extra"), PAIRS)
def test_every_replayed_step_has_the_bytes_of_the_run(steps_per_call, source, extra, tmp_path):
    recorder, key = Recorder(), jax.random.key(1)
    target = {"steps": 24, "epoch_steps": 10 if source == "generator" else None}
    new = partial(Engine, step, log_every=4, steps_per_call=steps_per_call)
    new(callbacks=usual(tmp_path, EXTRA[extra](), recorder)).run(START, SOURCES[source](), rng=key, **target)
    before = contents_below(tmp_path)
    sinks = JSONLines(tmp_path / "log"), TensorBoard(tmp_path / "tb"), Profiler(tmp_path / "trace", start=7, steps=2)
    engine = new(callbacks=usual(tmp_path, EXTRA[extra](), *sinks))
    for number in (1, 8, 12, 24):
        moment = engine.replay(START, SOURCES[source](), step=number, rng=key, **target)
        assert moment.checkpoint == {1: None, 8: 7, 12: 7, 24: 21}[number]
        same((moment.state, moment.carries, moment.batch), recorder.before[number])
        state, metrics, aux = moment.run()
        assert set(aux) == {"grads"}
        if extra != "state changed" or number % 6:
            same((state, metrics), recorder.after[number])
        assert set(moment.run(jit=False)[1]) == set(metrics)
    assert moment.first_bad() is None
    assert contents_below(tmp_path) == before


class Begins(Callback):
    """Changes the state where a session begins."""

    def on_run_begin(self, loop):
        loop.state = {"w": loop.state["w"] + 1}


@pytest.mark.parametrize("crashed", [False, True], ids=["complete", "crashed"])
def test_callbacks_that_change_the_run_take_part_and_no_other(crashed, tmp_path):
    """After a crash, no checkpoint says which callbacks changed the run since the last one."""
    recorder, key, target = Recorder(), jax.random.key(1), {"steps": 12}
    callbacks = [Begins(), Checkpoint(tmp_path, when=8, keep=9), Decay(), Noise(), recorder]
    Engine(step, callbacks).run(START, list(rows(0)), rng=key, **target)
    if crashed:
        shutil.rmtree(tmp_path / "12")
    before = contents_below(tmp_path)
    noise = Noise()
    callbacks = [Begins(), Checkpoint(tmp_path), Decay(), noise, Profiler(tmp_path / "trace", start=1)]
    engine = Engine(step, callbacks)
    generator = noise.get_state()
    for number in (2, 7, 10, 12):
        moment = engine.replay(START, list(rows(0)), step=number, rng=key, **target)
        same((moment.state, moment.batch), (recorder.before[number][0], recorder.before[number][2]))
    assert noise.get_state() == generator
    assert contents_below(tmp_path) == before


def test_step_on_a_mesh_is_replayed(tmp_path):
    mesh, recorder, key = make_mesh(), Recorder(), jax.random.key(1)
    data = Batches({"x": DATA}, 8, seed=3)
    callbacks = [NaNGuard(), Checkpoint(tmp_path, when=7, keep=9)]
    Engine(step, [*callbacks, recorder], mesh=mesh).run(START, data, steps=18, rng=key)
    before = contents_below(tmp_path)
    engine = Engine(step, [NaNGuard(), Checkpoint(tmp_path)], mesh=mesh)
    for number in (3, 18):
        moment = engine.replay(START, data, step=number, steps=18, rng=key)
        same((moment.state, moment.carries, moment.batch), recorder.before[number])
        state, metrics, _ = moment.run()
        same((state, metrics), recorder.after[number])
        np.testing.assert_allclose(moment.run(jit=False)[0]["w"], state["w"], rtol=1e-5)
        assert moment.first_bad() is None
    assert contents_below(tmp_path) == before


def test_directory_is_needed_if_the_engine_has_several(tmp_path):
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")])
    with pytest.raises(
        ValueError, match=r"needs one of the directories of this engine: .*a \(Checkpoint\), .*b \(Check"
    ):
        engine.replay(0, [1], step=1, epochs=1)


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
