"""Evaluation: evaluate(...) by itself, and the Evaluate callback in runs."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics as clu_metrics
from flax import struct
from onstep import Batches, Callback, Engine, at, evaluate, every
from onstep.callbacks import EMA, Evaluate

ROWS = [np.float32([1, 2, 3]), np.float32([10])]
"""Four examples in two batches, of mean 4."""


def train(state, batch):
    return {"params": state["params"] + batch}, {}


def run(callbacks, data=(1, 1, 1), state=0.0, **options):
    return Engine(train, callbacks).run({"params": jnp.float32(state)}, list(data), **({"epochs": 1} | options))


def mean(state, batch):
    return {"x": batch.mean()}


def distance(state, batch):
    return {"x": (batch - state["params"]).mean()}


def draw(state, batch, rng):
    return {"u": jax.random.uniform(rng)}


def endless():
    """1, 2, ...; whoever reads on and on is stopped."""
    yield from range(1, 100)
    raise AssertionError("read without an end")


def counted(function):
    """The function, and a list that grows whenever it is traced."""
    traces = []

    @functools.wraps(function)
    def step(*arguments):
        traces.append(None)
        return function(*arguments)

    return step, traces


def test_a_short_last_batch_counts_by_its_examples():
    assert evaluate(mean, None, ROWS) == {"x": 4.0}


def test_an_example_is_counted_along_the_leading_axis_of_the_first_array():
    data = [{"a": np.float32(7), "x": rows, "z": np.zeros((5, 2))} for rows in ROWS]
    assert evaluate(lambda state, batch: {"x": batch["x"].mean()}, None, data) == {"x": 4.0}


def test_batches_without_an_axis_count_once():
    assert evaluate(lambda state, batch: {"x": batch}, None, [1.0, 3.0, 8.0]) == {"x": 4.0}


def test_each_metric_has_its_mean():
    def step(state, batch):
        return {"x": batch.mean(), "off": abs(batch - state).mean()}

    assert evaluate(step, jnp.float32(2), ROWS) == pytest.approx({"x": 4.0, "off": 2.5})


def test_a_metric_of_some_batches_is_the_mean_over_those():
    def step(state, batch):
        return {"x": batch["x"].mean()} | ({"error": abs(batch["x"] - batch["y"]).mean()} if "y" in batch else {})

    data = [{"x": ROWS[0]}, {"x": ROWS[1], "y": np.float32([4])}]
    assert evaluate(step, None, data) == {"x": 4.0, "error": 6.0}


def test_a_collection_of_clu_metrics_merges_exactly():
    @struct.dataclass
    class Metrics(clu_metrics.Collection):
        accuracy: clu_metrics.Accuracy
        loss: clu_metrics.Average.from_output("loss")

    def step(state, batch):
        loss = (batch["logits"] ** 2).sum(axis=-1)
        return Metrics.single_from_model_output(loss=loss, **batch)

    logits = np.float32([[2, 1], [1, 2], [3, 0], [0, 3], [1, 0]])
    batches = Batches({"logits": logits, "labels": np.array([0, 0, 0, 0, 1])}, 2, shuffle=False, drop_last=False)
    assert evaluate(step, None, batches) == {"accuracy": pytest.approx(0.4), "loss": pytest.approx(29 / 5)}


def test_a_clu_metric_may_stand_beside_scalars():
    def step(state, batch):
        return {"last": clu_metrics.Average.from_model_output(batch), "x": batch.mean()}

    assert evaluate(step, None, ROWS) == {"last": 4.0, "x": 4.0}


def test_the_state_stays_the_callers():
    state = {"params": jnp.arange(3.0)}
    first, second = (evaluate(lambda state, batch: {"p": state["params"].sum()}, state, [1, 2]) for _ in range(2))
    assert first == second == {"p": 3.0}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Batches(np.float32([1, 2, 3, 10]), 2), id="Batches"),
        pytest.param(lambda: lambda epoch: iter(ROWS[epoch:]), id="a callable, called with 0"),
        pytest.param(lambda: (rows for rows in ROWS), id="a generator"),
        pytest.param(lambda: ROWS, id="a list"),
    ],
)
def test_data_is_any_source_of_batches(make):
    assert evaluate(mean, None, make()) == {"x": 4.0}


def test_steps_limits_endless_data_and_draws_no_more():
    source = endless()
    assert evaluate(lambda state, batch: {"x": batch}, None, source, steps=4) == {"x": 2.5}
    assert next(source) == 5


def test_steps_beyond_the_data_takes_what_there_is():
    assert evaluate(mean, None, ROWS, steps=9) == {"x": 4.0}


def test_a_step_that_takes_a_key_gets_another_one_for_each_batch():
    key = jax.random.key(3)
    expected = [float(jax.random.uniform(jax.random.fold_in(key, n))) for n in range(2)]
    assert len(set(expected)) == 2
    assert evaluate(draw, None, [1, 1], rng=key)["u"] == pytest.approx(sum(expected) / 2)
    assert evaluate(draw, None, [1, 1], rng=key) == evaluate(draw, None, [1, 1], rng=key)


def test_a_step_that_takes_a_key_needs_one():
    with pytest.raises(ValueError, match=r"evaluation step takes a random key .* Pass one: rng="):
        evaluate(draw, None, [1])


@pytest.mark.parametrize("data", [[], iter(()), lambda epoch: []], ids=["list", "iterator", "callable"])
def test_data_without_a_batch_is_refused(data):
    with pytest.raises(ValueError, match=r"The data to evaluate on yielded no batches"):
        evaluate(mean, None, data)


@pytest.mark.parametrize("data", [{"x": np.ones(3)}, "val", 7], ids=["dict", "str", "int"])
def test_what_is_no_source_of_batches_is_refused(data):
    with pytest.raises(TypeError, match=rf"needs to be an iterable of batches .* got {type(data).__name__}"):
        evaluate(mean, None, data)


def test_data_that_leaves_examples_out_is_a_warning():
    batches = Batches(np.float32([1, 2, 3, 10, 4]), 2, shuffle=False)
    with pytest.warns(UserWarning, match=r"leaves out 1 example.* drop_last=False"):
        assert evaluate(mean, None, batches) == {"x": 4.0}


def test_data_that_leaves_nothing_out_is_no_warning():
    values = np.float32([1, 2, 3, 10])
    assert evaluate(mean, None, Batches(values, 2)) == {"x": 4.0}
    assert evaluate(mean, None, Batches(values, 3, drop_last=False)) == {"x": 4.0}


def test_a_metric_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"The evaluation step needs scalar metrics, got shape \(3,\) for 'x'"):
        evaluate(lambda state, batch: {"x": batch}, None, ROWS)


def test_a_training_step_is_refused():
    with pytest.raises(TypeError, match=r"The evaluation step needs metrics as a dict of scalars by name, got tuple"):
        evaluate(train, {"params": 1.0}, [1])


def test_evaluating_again_compiles_nothing_again():
    step, traces = counted(distance)
    for params in (0, 1, 2):
        evaluate(step, {"params": jnp.float32(params)}, [ROWS[0]] * 2)
    assert len(traces) == 1


def test_a_short_last_batch_compiles_once_more():
    step, traces = counted(mean)
    for _ in range(3):
        evaluate(step, None, ROWS)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        pytest.param({}, [3, 6], id="every epoch without being told"),
        pytest.param({"when": 2}, [2, 4, 6], id="a plain int means steps"),
        pytest.param({"when": every(epochs=2)}, [6], id="every 2 epochs"),
        pytest.param({"when": at(1) | every(epochs=1)}, [1, 3, 6], id="first step and every epoch"),
    ],
)
def test_a_run_is_evaluated_when_it_is_due(when, steps):
    result = run([Evaluate(distance, ROWS, **when)], epochs=2)
    assert result.history.steps("val/x") == steps
    assert result.history["val/x"] == [4.0 - step for step in steps]


def test_an_evaluation_sees_its_own_step_and_the_epoch_counted():
    records = []

    class Note(Callback):
        def on_log(self, loop, record):
            records.append((record.step, record.epoch, record.values))

    run([Note(), Evaluate(distance, ROWS)], data=[1, 1], epochs=2)
    assert records == [(2, 1, {"val/x": 2.0}), (4, 2, {"val/x": 0.0})]


def test_sets_have_names():
    result = run([Evaluate(mean, ROWS), Evaluate(mean, ROWS[:1], name="test"), Evaluate(mean, ROWS[1:], name="rare")])
    assert dict(result.latest) == {"val/x": 4.0, "test/x": 2.0, "rare/x": 10.0}


def test_two_sets_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Two callbacks are named 'val'"):
        Engine(train, [Evaluate(mean, ROWS), Evaluate(mean, ROWS)])


def test_evaluating_leaves_the_run_as_it_is():
    ema = EMA(0.5)
    watched = run([ema, Evaluate(distance, ROWS, when=1), Evaluate(distance, ROWS, name="ema", using=ema, when=1)])
    assert watched.state == run([]).state


def test_using_an_average_evaluates_it_instead_of_the_run():
    ema = EMA(0.5)
    result = run([ema, Evaluate(distance, ROWS, when=1), Evaluate(distance, ROWS, name="ema", using=ema, when=1)])
    assert result.history["val/x"] == [3.0, 2.0, 1.0]
    assert result.history["ema/x"] == [4 - 0.5, 4 - 1.25, 4 - 2.125]


def test_using_an_average_does_not_depend_on_the_place_in_the_list():
    ema = EMA(0.5)
    result = run([Evaluate(distance, ROWS, using=ema), ema])
    assert result.latest["val/x"] == 4 - 2.125


def test_using_an_average_that_is_not_in_the_run_is_refused_before_the_first_step():
    seen = []
    engine = Engine(train, [Evaluate(mean, ROWS, using=EMA())])
    engine.on("step_end")(lambda loop: seen.append(loop.step))
    with pytest.raises(ValueError, match=r"This EMA is not among the run's callbacks \['val'"):
        engine.run({"params": 0.0}, [1, 1, 1], epochs=1)
    assert seen == []


def test_using_takes_anything_that_gives_a_state():
    class Zero:
        def apply(self, loop):
            return {"params": 0.0 * loop.state["params"]}

    assert run([Evaluate(distance, ROWS, using=Zero())]).latest["val/x"] == 4.0


def test_every_evaluation_of_a_run_has_the_same_keys():
    result = run([Evaluate(draw, [1, 1], when=1)], rng=jax.random.key(0))
    assert len(result.history["val/u"]) == 3
    assert len(set(result.history["val/u"])) == 1


def test_each_set_has_keys_of_its_own():
    key = jax.random.key(0)
    result = run([Evaluate(draw, [1]), Evaluate(draw, [1], name="test")], rng=key)
    assert result.latest["val/u"] != result.latest["test/u"]
    own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"test")), 0)
    assert result.latest["test/u"] == float(jax.random.uniform(own))


def test_a_step_that_takes_a_key_needs_one_of_the_run():
    with pytest.raises(ValueError, match=r"takes a random key .* Pass one: rng=") as error:
        run([Evaluate(draw, [1])])
    assert "val.on_" in error.value.__notes__[0]


def test_empty_data_ends_the_run():
    with pytest.raises(ValueError, match=r"The data to evaluate on yielded no batches: list") as error:
        run([Evaluate(mean, [])])
    assert "val.on_step_end at step 3" in error.value.__notes__[0]


def test_a_generator_serves_one_evaluation():
    with pytest.raises(ValueError, match=r"yielded no batches: generator. A generator can be read only once") as error:
        run([Evaluate(mean, (rows for rows in ROWS))], epochs=2)
    assert "val.on_step_end at step 6" in error.value.__notes__[0]


def test_a_dict_of_data_is_refused():
    with pytest.raises(TypeError, match=r"needs to be an iterable of batches .* got dict"):
        run([Evaluate(mean, {"x": np.ones(3)})])


def test_endless_data_is_evaluated_for_a_number_of_steps():
    result = run([Evaluate(lambda state, batch: {"x": batch}, endless(), steps=2)], epochs=2)
    assert result.history["val/x"] == [1.5, 3.5]


def test_the_evaluations_of_a_run_compile_once():
    step, traces = counted(distance)
    ema = EMA(0.5)
    callbacks = [ema, Evaluate(step, ROWS[:1], when=1), Evaluate(step, ROWS[:1], name="ema", using=ema, when=1)]
    engine = Engine(train, callbacks)
    result = engine.run({"params": jnp.float32(0)}, [1] * 4, steps=3)
    engine.run(result, [1] * 4, steps=4)
    assert len(traces) == 1


def test_a_value_that_is_not_finite_is_recorded_as_such():
    result = run([Evaluate(lambda state, batch: {"nan": jnp.log(-batch.mean()), "inf": 1 / (0 * batch.mean())}, ROWS)])
    assert np.isnan(result.latest["val/nan"])
    assert result.latest["val/inf"] == np.inf
