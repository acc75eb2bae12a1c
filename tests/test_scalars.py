"""Scalars: numbers of the state, found by name, at the steps of the training records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from onstep import Engine
from onstep.callbacks import Scalars


def count(state, batch):
    """Every number doubles."""
    return jax.tree.map(lambda x: x if x.ndim else 2 * x, state), {"loss": 0.0}


def run(scalars, state, *, steps=4, log_every=2):
    return Engine(count, [scalars], log_every=log_every).run(state, [0] * steps, epochs=1)


def test_number_at_the_end_of_each_window_is_recorded():
    history = run(Scalars("scale"), {"scale": 1.0}, steps=5).history
    assert history.steps("scale") == history.steps("train/loss") == [2, 4, 5]
    assert history["scale"] == [4.0, 16.0, 32.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("scale", 6.0, id="the last part"),
        pytest.param("amp.scale", 6.0, id="dotted"),
        pytest.param("amp/scale", 6.0, id="slashes"),
        pytest.param("opt.1.count", 20.0, id="in a list"),
        pytest.param("0/count", 12.0, id="with the index"),
    ],
)
def test_leaf_is_named_by_a_unique_end_of_its_path(name, value):
    result = run(
        Scalars(name), {"amp": {"scale": jnp.bfloat16(1.5), "w": jnp.ones(3)}, "opt": [{"count": 3}, {"count": 5}]}
    )
    assert result.history[name][0] == value


def test_name_matches_whole_parts_of_a_path():
    assert run(Scalars("scale"), {"scale": 1.0, "prescale": 5.0}).history["scale"] == [4.0, 16.0]


def test_several_numbers_are_recorded_from_a_mixed_state():
    state = {"a": 1.0, "b": 2, "w": jnp.ones(3), "key": jax.random.key(0), "empty": {}, "none": None}

    def step(state, batch):
        return {**state, "a": state["a"] * 2, "b": state["b"] + 1}, {"loss": 0.0}

    history = Engine(step, [Scalars("a", "b")]).run(state, [0] * 3, epochs=1).history
    assert (history["a"], history["b"]) == ([8.0], [5.0])


def test_counters_of_an_optimizer_are_found():
    tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=3)

    def step(state, batch):
        _, opt_state = tx.update(batch, state["opt_state"], jnp.float32(0))
        return {"opt_state": opt_state}, {"loss": batch}

    scalars = Scalars("mini_step", "opt_state.gradient_step")
    engine = Engine(step, [scalars], log_every=1)
    history = engine.run({"opt_state": tx.init(jnp.float32(0))}, [np.float32(1)] * 5, epochs=1).history
    assert (history["mini_step"], history["opt_state.gradient_step"]) == ([1, 2, 0, 1, 2], [0, 0, 1, 1, 1])


def test_variables_of_an_nnx_state_are_found():
    state = nnx.State({"model": {"temperature": nnx.Param(jnp.float32(1))}})
    assert run(Scalars("temperature"), state).history["temperature"] == [4.0, 16.0]


def test_numbers_that_are_not_finite_are_recorded():
    values = run(Scalars("a", "b"), {"a": jnp.inf, "b": jnp.nan}).history
    np.testing.assert_equal((values["a"], values["b"]), ([np.inf] * 2, [np.nan] * 2))


def test_resumed_run_continues_to_record():
    engine = Engine(count, [Scalars("a")], log_every=2)
    first = engine.run({"a": 1.0}, [0] * 5, steps=2)
    assert engine.run(first, [0] * 5, steps=5).history["a"] == [16.0, 32.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("sale", r"found no leaf named 'sale' in the state. Did you mean scale", id="misspelt"),
        pytest.param(
            "count",
            r"needs one leaf named 'count', got \['opt/0/count', 'opt/1/count'\]. Give more of the path",
            id="two",
        ),
        pytest.param("w", r"needs a number at 'w', got float32\[3\]", id="array"),
        pytest.param("key", r"needs a number at 'key', got key<fry>\[\]", id="key"),
    ],
)
def test_name_that_is_not_one_number_raises_when_the_run_starts(name, message):
    state = {"scale": 1.0, "w": jnp.ones(3), "opt": [{"count": 3}, {"count": 5}], "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=f"Scalars {message}"):
        run(Scalars(name), state)


def test_repr_reads_like_the_call():
    assert repr(Scalars("scale", "opt_state.count", name="x")) == "Scalars('scale', 'opt_state.count', name='x')"
