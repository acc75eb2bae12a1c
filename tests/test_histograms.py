"""Histograms, read with TensorBoard's own reader and compared with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine, at, every
from onstep.callbacks import Histograms
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def descend(state, batch):
    """The batch is the gradient."""
    params = jax.tree.map(lambda param, grad: param - grad, state["params"], batch)
    return {**state, "params": params}, {}, {"grads": batch}


def stay(state, batch):
    return state, {}


def written(directory):
    """Return the histograms that TensorBoard shows, by name and step."""
    reader = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    reader.Reload()
    tags = reader.Tags()["histograms"]
    return {tag: {event.step: event.histogram_value for event in reader.Histograms(tag)} for tag in tags}


def one(directory, params, step=stay, **options):
    """Return the histograms of these parameters after one step."""
    Engine(step, [Histograms(directory, when=1, **options)]).run({"params": params}, [0], epochs=1)
    return {tag: steps[1] for tag, steps in written(directory).items()}


def test_counts_match_numpy(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    counts, edges = np.histogram(values, 64)
    got = one(tmp_path, {"w": values})["params/w"]
    assert got.bucket == counts.tolist()
    np.testing.assert_allclose(got.bucket_limit, edges[1:], rtol=1e-6, atol=1e-6)
    wide = values.astype(float)
    expected = (wide.min(), wide.max(), wide.size, wide.sum(), (wide**2).sum())
    assert (got.min, got.max, got.num, got.sum, got.sum_squares) == pytest.approx(expected, rel=1e-4)


def test_each_leaf_is_named_by_its_path(tmp_path):
    params = {"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}, "heads": [np.ones(1)]}
    assert set(one(tmp_path, params)) == {"params/dense/kernel", "params/dense/bias", "params/heads/0"}


def test_of_may_name_a_single_array(tmp_path):
    Engine(stay, [Histograms(tmp_path, of="gen.w", when=1)]).run({"gen": {"w": np.ones(3)}}, [0], epochs=1)
    assert set(written(tmp_path)) == {"gen.w"}


def test_values_that_are_not_finite_are_left_out(tmp_path):
    got = one(tmp_path, np.float32([0, np.nan, 1, np.inf, 2, -np.inf, 2]))["params"]
    assert (got.min, got.max, got.num, got.sum) == (0, 2, 4, 5)
    assert got.bucket == np.histogram([0, 1, 2, 2], 64)[0].tolist()


def test_equal_values_get_the_range_of_numpy(tmp_path):
    got = one(tmp_path, np.full(7, 3.0, np.float32))["params"]
    assert (got.min, got.max, got.num, sum(got.bucket)) == (2.5, 3.5, 7, 7)
    assert got.bucket_limit == np.histogram_bin_edges(np.full(7, 3.0), 64)[1:].tolist()


def test_only_leaves_with_finite_real_floats_are_written(tmp_path):
    params = {
        "half": jnp.bfloat16([1, 2]),
        "n": 3,
        "key": jax.random.key(0),
        "z": 1j,
        "nan": jnp.nan,
        "no": jnp.zeros((0, 3)),
    }
    got = one(tmp_path, params)
    assert {tag: histogram.sum for tag, histogram in got.items()} == {"params/half": 3.0}


@pytest.mark.parametrize("grads", [True, False])
def test_empty_parameters_write_nothing(tmp_path, grads):
    Engine(descend, [Histograms(tmp_path / "run", when=1, grads=grads)]).run({"params": {}}, [{}], epochs=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"jit": False}, {"steps_per_call": 4}], ids=str)
def test_gradients_are_taken_at_the_due_step(tmp_path, options):
    grads = np.random.default_rng(0).normal(size=(5, 99)).astype(np.float32)
    histograms = Histograms(tmp_path, grads=True, when=2)
    engine = Engine(descend, [histograms], **options)
    result = engine.run({"params": {"w": np.zeros(99)}}, [{"w": grad} for grad in grads], epochs=1)
    got = written(tmp_path)
    assert {tag: set(steps) for tag, steps in got.items()} == {"params/w": {2, 4}, "grads/w": {2, 4}}
    for step in (2, 4):
        assert got["grads/w"][step].bucket == np.histogram(grads[step - 1], 64)[0].tolist()
        assert got["params/w"][step].sum == pytest.approx(-grads[:step].sum(), rel=1e-4)
    assert (
        result.carry(histograms)[0, :64].tolist() == got["grads/w"][4].bucket
    )  # not counted again at step 5, which is not due


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        pytest.param(2, {2, 4}, id="every 2 steps"),
        pytest.param(at(1) | every(epochs=1), {1, 5}, id="step 1 and the epoch's end"),
        pytest.param(None, {5}, id="every epoch by default"),
    ],
)
def test_histograms_are_written_at_due_steps(tmp_path, when, steps):
    histograms = Histograms(tmp_path) if when is None else Histograms(tmp_path, when=when)
    Engine(stay, [histograms]).run({"params": np.ones(2)}, iter([0] * 5), epochs=1)
    assert set(written(tmp_path)["params"]) == steps


def test_resumed_run_writes_each_step_once(tmp_path):
    grads = [np.full(3, n, np.float32) for n in range(6)]
    engine = Engine(descend, [Histograms(tmp_path, grads=True, when=2)])
    first = engine.run({"params": np.zeros(3, np.float32)}, grads, steps=3)
    for _ in range(2):
        last = engine.run(first, grads, steps=6)
    got = written(tmp_path)
    assert {tag: {step: value.sum for step, value in values.items()} for tag, values in got.items()} == {
        "params": {2: -3.0, 4: -18.0, 6: -45.0},
        "grads": {2: 3.0, 4: 9.0, 6: 15.0},
    }
    assert np.array_equal(
        last.state["params"], engine.run({"params": np.zeros(3, np.float32)}, grads, steps=6).state["params"]
    )


def test_histograms_do_not_change_the_run(tmp_path):
    grads = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    plain = Engine(descend).run({"params": np.ones(9)}, list(grads), epochs=1).state["params"]
    drawn = Engine(descend, [Histograms(tmp_path, grads=True, when=1)]).run(
        {"params": np.ones(9)}, list(grads), epochs=1
    )
    assert plain.tobytes() == drawn.state["params"].tobytes()


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        pytest.param(
            {},
            r"to have the structure of 'params', but from 'params' to aux.'grads'., w: float32\[3\] is gone",
            id="none",
        ),
        pytest.param({"grads": {"v": 1.0}}, "w: .* is gone; v: .* is new. Return it from the step", id="others"),
    ],
)
def test_step_without_such_gradients_raises_an_error_that_says_what_to_return(tmp_path, aux, message):
    engine = Engine(lambda state, batch: (state, {}, aux), [Histograms(tmp_path, grads=True, when=at(9))])
    with pytest.raises(ValueError, match=rf"Histograms\(grads=True\) needs aux\['grads'\] .*{message}"):
        engine.run({"params": {"w": np.ones(3)}}, [0], epochs=1)


@pytest.mark.parametrize("grads", [True, False])
def test_unknown_field_raises_an_error_that_lists_the_fields(tmp_path, grads):
    with pytest.raises(ValueError, match=r"Histograms needs 'weights' in the state, but dict has \['params'\]"):
        one(tmp_path, np.ones(2), of="weights", grads=grads)


def test_repr_reads_like_the_call():
    assert repr(Histograms("runs/board")) == "Histograms('runs/board')"
    assert repr(Histograms("runs", grads=True, when=100)) == "Histograms('runs', grads=True, when=100)"
