"""ClipWeights: what is clipped, when, and what stays unchanged."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState
from onstep import Engine, at
from onstep.callbacks import ClipWeights


def add(state, batch):
    return {**state, "params": state["params"] + batch}, {"before": state["params"].max()}


def run(clip, params, batches, **options):
    return Engine(add, [clip], log_every=1, **options).run({"params": params}, batches, epochs=1)


def test_weights_match_numpy_after_every_step():
    expected = params = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    batches = list(np.random.default_rng(1).normal(size=(5, 4, 3)).astype(np.float32))
    for batch in batches:
        expected = np.clip(expected + batch, -0.5, 0.25)
    assert np.array_equal(run(ClipWeights(-0.5, 0.25), params, batches).state["params"], expected)


@pytest.mark.parametrize(
    ("when", "before"),
    [
        pytest.param(1, [0, 2, 2, 2], id="every step"),
        pytest.param(2, [0, 3, 2, 5], id="every 2 steps"),
        pytest.param(at(3), [0, 3, 6, 2], id="at step 3"),
    ],
)
def test_weights_are_clipped_at_due_steps(when, before):
    assert run(ClipWeights(-2, 2, when=when), np.float32([0]), [3.0] * 4).history["train/before"] == before


@pytest.mark.parametrize(("low", "high", "expected"), [(0, math.inf, [0, 9]), (-math.inf, 0, [-9, 0])])
def test_one_bound_may_be_infinite(low, high, expected):
    assert run(ClipWeights(low, high), np.float32([-9, 9]), [0]).state["params"].tolist() == expected


def test_only_real_floats_of_the_field_are_clipped():
    critic = {"w": jnp.float32(9), "half": jnp.bfloat16(9), "n": 9, "key": jax.random.key(0), "z": 9j, "empty": {}}
    state = {"critic": {"params": critic}, "actor": jnp.float32(9)}
    clip = ClipWeights(-1, 1, of="critic.params")
    after = Engine(lambda state, batch: (state, {}), [clip]).run(state, [0], epochs=1).state
    clipped = {**critic, "w": 1, "half": 1}
    assert after == {"critic": {"params": clipped}, "actor": 9}
    assert after["critic"]["params"]["half"].dtype == jnp.bfloat16


def test_nan_stays_nan():
    assert np.isnan(run(ClipWeights(-1, 1), np.float32([math.nan]), [0]).state["params"]).all()


def test_train_state_is_clipped_after_its_optimizer():
    import optax

    state = TrainState.create(apply_fn=None, params={"w": jnp.float32(0)}, tx=optax.sgd(1.0))
    engine = Engine(lambda state, batch: (state.apply_gradients(grads={"w": batch}), {}), [ClipWeights(-0.01, 0.01)])
    assert engine.run(state, [5.0, -0.005], epochs=1).state.params == {"w": np.float32(-0.01) + np.float32(0.005)}


def test_resumed_run_ends_in_the_same_bytes():
    batches = list(np.random.default_rng(1).normal(size=(7, 9)).astype(np.float32))
    engine = Engine(add, [ClipWeights(-0.5, 0.5, when=2)])
    whole = engine.run({"params": np.zeros(9)}, batches, steps=7).state["params"]
    parts = engine.run(engine.run({"params": np.zeros(9)}, batches, steps=3), batches, steps=7).state["params"]
    assert whole.tobytes() == parts.tobytes()


@pytest.mark.parametrize("options", [{"jit": False}, {"steps_per_call": 4}], ids=["uncompiled", "in blocks"])
def test_weights_are_the_same_in_every_execution_mode(options):
    plain, other = (
        run(ClipWeights(-2, 2, when=2), np.float32([0]), [3.0] * 5, **how).state["params"]
        for how in ({"steps_per_call": 1}, options)
    )
    assert plain == other == 5


def test_unknown_field_raises_an_error_that_lists_the_fields():
    with pytest.raises(ValueError, match=r"ClipWeights needs 'critic' in the state, but dict has \['params'\]"):
        run(ClipWeights(-1, 1, of="critic"), np.float32([0]), [0])


@pytest.mark.parametrize(("low", "high"), [(1, -1), (0, 0), (math.nan, 1)])
def test_bounds_in_the_wrong_order_raise(low, high):
    with pytest.raises(ValueError, match=f"ClipWeights needs low < high, got {low} and {high}"):
        ClipWeights(low, high)


def test_repr_reads_like_the_call():
    assert repr(ClipWeights(-0.01, 0.01)) == "ClipWeights(-0.01, 0.01)"
    assert repr(ClipWeights(-1, math.inf, of="critic.params")) == "ClipWeights(-1, inf, of='critic.params')"
