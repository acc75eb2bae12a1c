"""Runs without a data source: the step needs no batch, or a callback makes each batch from the newest state."""

import jax
import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, every
from onstep.callbacks import Checkpoint
from onstep.sharding import make_mesh
from onstep.testing import same_bytes


def step(state, batch):
    return state + batch, {"batch": batch}


class Act(Callback):
    """Make each batch from the newest state: 1, 2, 4, ..."""

    def on_step_begin(self, loop):
        loop.batch = loop.state + 1


def decay(state, batch, rng):
    assert batch is None
    return state * jax.random.uniform(rng), {"state": state}


def test_each_batch_is_made_from_the_newest_state():
    result = Engine(step, [Act()], log_every=1).run(jnp.int32(0), steps=4)
    assert result.history["train/batch"] == [1, 2, 4, 8]
    assert int(result.state) == 15


@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"steps_per_call": 4}, {"prefetch": 2}, {"jit": False}])
def test_run_without_data_equals_a_loop_over_the_step(options):
    key, expected = jax.random.key(0), jnp.float32(1)
    for number in range(10):
        expected, _ = jax.jit(decay)(expected, None, jax.random.fold_in(key, number))
    result = Engine(decay, **options).run(jnp.float32(1), steps=10, rng=key)
    assert same_bytes(result.state, expected)


def test_run_without_data_works_on_a_mesh():
    key = jax.random.key(0)
    result = Engine(decay, mesh=make_mesh()).run(jnp.float32(1), steps=3, rng=key)
    assert same_bytes(result.state, Engine(decay).run(jnp.float32(1), steps=3, rng=key).state)


def test_run_without_data_resumes_without_skipping(tmp_path, capfd):
    def run(steps):
        return Engine(step, [Act(), Checkpoint(tmp_path, when=1)]).run(jnp.int32(0), steps=steps)

    run(3)
    assert int(run(5).state) == 31
    assert "resuming from step 3 of 5" in (errors := capfd.readouterr().err)
    assert "skipping" not in errors


def test_result_of_a_run_without_data_can_be_continued():
    engine = Engine(step, [Act()])
    assert int(engine.run(engine.run(jnp.int32(0), steps=2), steps=4).state) == 15


def test_epochs_of_a_run_without_data_have_epoch_steps():
    assert Engine(step, [Act()]).run(jnp.int32(0), epochs=2, epoch_steps=2).step == 4


def test_epochs_without_data_and_epoch_steps_are_refused():
    with pytest.raises(ValueError, match=r"A run without data .* Pass epoch_steps=, use steps= instead, or pass"):
        Engine(step, [Act()]).run(jnp.int32(0), epochs=2)


def test_for_loop_runs_without_data():
    with Engine(step, [Act()]).steps(jnp.int32(0), steps=4, when=every(2)) as steps:
        assert [int(loop.state) for loop in steps] == [3, 15]
