"""Evaluation: the function `evaluate`, and the callback `Evaluate` in runs."""

import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics as clu_metrics
from flax import struct
from onstep import Batches, Callback, Engine, at, evaluate, every
from onstep.callbacks import EMA, Evaluate
from onstep.testing import SizedData
from onstep.tools import Observer

ROWS = [np.float32([1, 2, 3]), np.float32([10])]
"""Four examples in two batches, with mean 4."""


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
    """Yield 1, 2, ...; reading all of it is an error."""
    yield from range(1, 100)
    raise AssertionError("read without end")


def counted(function):
    """Return the function, and a list that grows whenever it is traced."""
    traces = []

    @functools.wraps(function)
    def step(*arguments):
        traces.append(None)
        return function(*arguments)

    return step, traces


def test_a_short_last_batch_is_weighted_by_its_examples():
    assert evaluate(mean, None, ROWS) == {"x": 4.0}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: {"a": np.float32(7), "x": x, "z": np.zeros((5, 2))}, id="an array without examples"),
        pytest.param(lambda x: (np.zeros(2, np.uint32), x), id="a tuple that begins with a key"),
        pytest.param(lambda x: {"weights": np.ones(3), "x": x}, id="an array that has their number at first"),
        pytest.param(lambda x: {"lengths": x, "x": np.stack([x, x])}, id="time-major with lengths"),
    ],
)
def test_examples_are_counted_along_the_axes_that_a_short_last_batch_makes_shorter(make):
    def step(state, batch):
        return {"x": (batch["x"] if isinstance(batch, dict) else batch[1]).mean()}

    assert evaluate(step, None, [make(rows) for rows in ROWS]) == {"x": 4.0}
    assert evaluate(step, None, [make(rows) for rows in [ROWS[0], ROWS[0], ROWS[1]]]) == {"x": 22 / 7}


def short_last(shape, last):
    return [np.zeros(shape), np.zeros(shape), np.ones(last)]


UNKNOWN = {
    "two axes of one leaf, and labels": [
        {"x": x, "y": np.zeros(n)} for x, n in zip(short_last((5, 4), (3, 2)), (4, 4, 2), strict=True)
    ],
    "class weights and sequences": [{"w": np.ones(10), "x": x} for x in short_last((4, 8), (4, 2))],
    "graphs of any size": [{"labels": np.ones(2), "x": np.ones(n)} for n in (5, 7, 6)],
    "other leaves": [{"w": np.ones(10), "x": np.ones(4)}, {"w": np.ones(10), "x": np.ones(2), "y": np.ones(2)}],
}


@pytest.mark.parametrize("data", UNKNOWN.values(), ids=UNKNOWN)
def test_examples_that_shapes_do_not_tell_are_asked_for(data):
    with pytest.raises(ValueError, match=r'cannot tell how many examples .* pass its name: weight="examples"'):
        evaluate(lambda state, batch: {"x": batch["x"].mean()}, None, data)

    def step(state, batch):
        return {"x": batch["x"].mean(), "examples": batch["x"].shape[-1]}

    sizes = [batch["x"].shape[-1] for batch in data]
    expected = sum(batch["x"].mean() * n for batch, n in zip(data, sizes, strict=True)) / sum(sizes)
    assert evaluate(step, None, data, weight="examples") == {"x": pytest.approx(expected)}


def test_batches_that_differ_along_inner_axes_count_the_same_with_a_warning():
    with pytest.warns(UserWarning, match=r'differ along other axes than the leading one.* weight="examples"'):
        assert evaluate(mean, None, short_last((4, 8), (4, 2))) == {"x": 1 / 3}


def test_the_sharded_axis_counts_the_examples():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    assert evaluate(mean, None, short_last((4, 8), (4, 2)), mesh=sharding) == {"x": pytest.approx(1 / 9)}


def test_clu_metrics_need_no_number_of_examples():
    def step(state, batch):
        return {"x": clu_metrics.Average.from_model_output(batch["x"])}

    data = [{"x": np.float32([1, 2, 3]), "y": np.ones(1)}, {"x": np.float32([2]), "y": np.ones(2)}]
    assert evaluate(step, None, data) == {"x": 2.0}


@pytest.mark.parametrize(
    ("weight", "found"),
    [("n", r"\['u', 'x'\]"), ("u", r"\[0.0, 0.0\]"), ("x", r"\[-1.0, 1.0\]")],
    ids=["missing", "always 0", "negative"],
)
def test_a_weight_that_is_none_is_an_error(weight, found):
    with pytest.raises(ValueError, match=rf"needs the metric '{weight}' in every batch as its weight, .* got {found}"):
        evaluate(lambda state, batch: {"x": batch, "u": 0.0}, None, [-1.0, 1.0], weight=weight)


def test_the_weight_of_a_run_is_a_metric_that_is_not_recorded():
    def step(state, batch):
        return {"x": batch.mean(), "n": batch.size}

    with pytest.warns(UserWarning, match="differ"):
        run([Evaluate(mean, short_last((4, 8), (4, 2)))])
    assert run([Evaluate(step, short_last((4, 8), (4, 2)), weight="n")]).latest == {"val/x": 1 / 9}


def test_scalar_batches_have_equal_weights():
    assert evaluate(lambda state, batch: {"x": batch}, None, [1.0, 3.0, 8.0]) == {"x": 4.0}


def test_each_metric_has_its_own_mean():
    def step(state, batch):
        return {"x": batch.mean(), "off": abs(batch - state).mean()}

    assert evaluate(step, jnp.float32(2), ROWS) == pytest.approx({"x": 4.0, "off": 2.5})


def test_a_metric_of_some_batches_is_averaged_over_these_batches():
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


def test_clu_metrics_and_scalars_can_be_mixed():
    def step(state, batch):
        return {"last": clu_metrics.Average.from_model_output(batch), "x": batch.mean()}

    assert evaluate(step, None, ROWS) == {"last": 4.0, "x": 4.0}


def test_the_state_is_not_donated():
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
def test_data_can_be_any_source_of_batches(make):
    assert evaluate(mean, None, make()) == {"x": 4.0}


def test_steps_limits_how_many_batches_are_drawn():
    source = endless()
    assert evaluate(lambda state, batch: {"x": batch}, None, source, steps=4) == {"x": 2.5}
    assert next(source) == 5


def test_more_steps_than_batches_use_all_batches():
    assert evaluate(mean, None, ROWS, steps=9) == {"x": 4.0}


def test_a_step_that_takes_a_key_gets_a_different_one_for_each_batch():
    key = jax.random.key(3)
    expected = [float(jax.random.uniform(jax.random.fold_in(key, n))) for n in range(2)]
    assert len(set(expected)) == 2
    assert evaluate(draw, None, [1, 1], rng=key)["u"] == pytest.approx(sum(expected) / 2)
    assert evaluate(draw, None, [1, 1], rng=key) == evaluate(draw, None, [1, 1], rng=key)


def test_a_step_that_takes_a_key_raises_without_one():
    with pytest.raises(ValueError, match=r"evaluation step takes a random key .* Pass one: rng="):
        evaluate(draw, None, [1])


@pytest.mark.parametrize("data", [[], iter(()), lambda epoch: []], ids=["list", "iterator", "callable"])
def test_data_without_batches_is_an_error(data):
    with pytest.raises(ValueError, match=r"The evaluation data yielded no batches"):
        evaluate(mean, None, data)


@pytest.mark.parametrize("data", [{"x": np.ones(3)}, "val", 7], ids=["dict", "str", "int"])
def test_data_that_is_not_a_source_of_batches_is_an_error(data):
    with pytest.raises(TypeError, match=rf"needs to be an iterable of batches .* got {type(data).__name__}"):
        evaluate(mean, None, data)


def test_data_that_drops_examples_causes_a_warning():
    batches = Batches(np.float32([1, 2, 3, 10, 4]), 2, shuffle=False)
    with pytest.warns(UserWarning, match=r"drops 1 example.* drop_last=False") as warned:
        assert evaluate(mean, None, batches) == {"x": 4.0}
    assert warned[0].filename == __file__


def test_data_that_drops_nothing_causes_no_warning():
    values = np.float32([1, 2, 3, 10])
    assert evaluate(mean, None, Batches(values, 2)) == {"x": 4.0}
    assert evaluate(mean, None, Batches(values, 3, drop_last=False)) == {"x": 4.0}


def test_a_metric_that_is_not_a_scalar_is_an_error():
    with pytest.raises(ValueError, match=r"The evaluation step needs scalar metrics, got shape \(3,\) for 'x'"):
        evaluate(lambda state, batch: {"x": batch}, None, ROWS)


def test_a_training_step_is_an_error():
    with pytest.raises(TypeError, match="The evaluation step needs to return only metrics, got 2 results"):
        evaluate(train, {"params": 1.0}, [1])


def test_evaluating_again_does_not_compile_again():
    step, traces = counted(distance)
    for params in (0, 1, 2):
        evaluate(step, {"params": jnp.float32(params)}, [ROWS[0]] * 2)
    assert len(traces) == 1


def test_an_evaluation_waits_for_all_batches_but_the_last_two(monkeypatch):
    finished, started, most = set(), [], []

    class Unfinished:
        """A metric whose batch is computed once somebody waits for it."""

        def __init__(self):
            self.number = len(started)

        def block_until_ready(self):
            finished.update(range(self.number + 1))

        def merge(self, other):
            return other

        def compute(self):
            return self.number

    def step(state, batch):
        metrics = {"last": Unfinished()}
        started.append(batch)
        most.append(len(started) - len(finished))
        return metrics

    monkeypatch.setattr("onstep.placement.SingleDevice.compile_evaluation", lambda self, step: step)
    assert evaluate(step, 0, range(9)) == {"last": 8}
    assert max(most) == 3  # the one that is being started, and two before it


def test_a_short_last_batch_compiles_once_more():
    step, traces = counted(mean)
    for _ in range(3):
        evaluate(step, None, ROWS)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        pytest.param({}, [3, 6], id="every epoch by default"),
        pytest.param({"when": 2}, [2, 4, 6], id="a plain int means steps"),
        pytest.param({"when": every(epochs=2)}, [6], id="every 2 epochs"),
        pytest.param({"when": at(1) | every(epochs=1)}, [1, 3, 6], id="first step and every epoch"),
    ],
)
def test_a_run_is_evaluated_when_due(when, steps):
    result = run([Evaluate(distance, ROWS, **when)], epochs=2)
    assert result.history.steps("val/x") == steps
    assert result.history["val/x"] == [4.0 - step for step in steps]


def test_an_evaluation_is_recorded_at_its_step_with_its_epoch_counted():
    records = []

    class Note(Callback):
        def on_log(self, loop, record):
            records.append((record.step, record.epoch, record.values))

    run([Note(), Evaluate(distance, ROWS)], data=[1, 1], epochs=2)
    assert records == [(2, 1, {"val/x": 2.0}), (4, 2, {"val/x": 0.0})]


def test_data_sets_have_names():
    result = run([Evaluate(mean, ROWS), Evaluate(mean, ROWS[:1], name="test"), Evaluate(mean, ROWS[1:], name="rare")])
    assert dict(result.latest) == {"val/x": 4.0, "test/x": 2.0, "rare/x": 10.0}


def test_two_data_sets_with_the_same_name_are_an_error():
    with pytest.raises(ValueError, match="Two callbacks are named 'val'"):
        Engine(train, [Evaluate(mean, ROWS), Evaluate(mean, ROWS)])


def test_evaluating_does_not_change_the_run():
    ema = EMA(0.5)
    watched = run([ema, Evaluate(distance, ROWS, when=1), Evaluate(distance, ROWS, name="ema", using=ema, when=1)])
    assert watched.state == run([]).state


def test_using_an_average_evaluates_the_average():
    ema = EMA(0.5)
    result = run([ema, Evaluate(distance, ROWS, when=1), Evaluate(distance, ROWS, name="ema", using=ema, when=1)])
    assert result.history["val/x"] == [3.0, 2.0, 1.0]
    assert result.history["ema/x"] == [4 - 0.5, 4 - 1.25, 4 - 2.125]


def test_an_average_can_be_listed_before_or_after_its_evaluation():
    ema = EMA(0.5)
    result = run([Evaluate(distance, ROWS, using=ema), ema])
    assert result.latest["val/x"] == 4 - 2.125


def test_using_an_average_that_is_not_in_the_run_is_an_error_before_the_first_step():
    seen = []
    engine = Engine(train, [Evaluate(mean, ROWS, using=EMA())])
    engine.on("step_end")(lambda loop: seen.append(loop.step))
    with pytest.raises(ValueError, match=r"This EMA is not among the run's callbacks \['val'"):
        engine.run({"params": 0.0}, [1, 1, 1], epochs=1)
    assert seen == []


def test_using_takes_any_object_with_an_apply_method():
    class Zero:
        def apply(self, loop):
            return {"params": 0.0 * loop.state["params"]}

    assert run([Evaluate(distance, ROWS, using=Zero())]).latest["val/x"] == 4.0


def test_every_evaluation_of_a_run_uses_the_same_keys():
    result = run([Evaluate(draw, [1, 1], when=1)], rng=jax.random.key(0))
    assert len(result.history["val/u"]) == 3
    assert len(set(result.history["val/u"])) == 1


def test_each_data_set_has_its_own_keys():
    key = jax.random.key(0)
    result = run([Evaluate(draw, [1]), Evaluate(draw, [1], name="test")], rng=key)
    assert result.latest["val/u"] != result.latest["test/u"]
    key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"test")), 0)
    assert result.latest["test/u"] == float(jax.random.uniform(key))


def test_a_step_that_takes_a_key_raises_if_the_run_has_none():
    with pytest.raises(ValueError, match=r"takes a random key .* Pass one: rng=") as error:
        run([Evaluate(draw, [1])])
    assert "val.on_" in error.value.__notes__[0]


def test_empty_data_is_an_error_in_the_run():
    with pytest.raises(ValueError, match=r"The evaluation data yielded no batches: list") as error:
        run([Evaluate(mean, [])])
    assert "val.on_run_begin at step 0" in error.value.__notes__[0]


def broken(state, batch):
    return {"x": batch @ jnp.ones(17)}


@pytest.mark.parametrize(
    "data", [ROWS, lambda epoch: iter(ROWS), Batches(ROWS[0], 1)], ids=["list", "callable", "Batches"]
)
def test_an_error_in_an_evaluation_step_is_raised_before_the_first_step(data):
    seen = []
    engine = Engine(train, [Evaluate(broken, data)])
    engine.on("step_begin")(lambda loop: seen.append(loop.step))
    with pytest.raises(TypeError, match="contracting dimensions") as error:
        engine.run({"params": jnp.float32(0)}, [1, 1], epochs=1)
    origin, event = [note for note in error.value.__notes__ if note.startswith("onstep")]
    assert origin.startswith("onstep: raised by the evaluation step broken, ")
    assert origin.endswith('return {"x": batch @ jnp.ones(17)}')
    assert event == "onstep: raised by val.on_run_begin at step 0"
    assert seen == []


def test_data_that_can_be_read_once_is_not_touched_before_its_evaluation():
    with pytest.raises(TypeError, match="contracting dimensions") as error:
        run([Evaluate(broken, iter(ROWS))])
    assert error.value.__notes__[-1] == "onstep: raised by val.on_step_end at step 3"


def test_a_run_with_nothing_left_to_do_draws_no_evaluation_data():
    def draw(epoch):
        drawn.append(epoch)
        return ROWS

    drawn = []
    engine = Engine(train, [Evaluate(mean, draw)])
    result = engine.run({"params": jnp.float32(0)}, [1], epochs=1)
    assert drawn == [0, 0]
    engine.run(result, [1], epochs=1)
    assert drawn == [0, 0]


def test_a_generator_is_enough_for_one_evaluation():
    with pytest.raises(ValueError, match=r"yielded no batches: generator. A generator can be read only once") as error:
        run([Evaluate(mean, (rows for rows in ROWS), when=3)], epochs=2)
    assert "val.on_step_end at step 6" in error.value.__notes__[0]


def test_a_dict_of_arrays_is_an_error_in_the_run():
    with pytest.raises(TypeError, match=r"needs to be an iterable of batches .* got dict"):
        run([Evaluate(mean, {"x": np.ones(3)})])


def test_endless_data_is_evaluated_for_a_number_of_batches():
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


def test_a_value_that_is_not_finite_is_recorded():
    result = run([Evaluate(lambda state, batch: {"nan": jnp.log(-batch.mean()), "inf": 1 / (0 * batch.mean())}, ROWS)])
    assert np.isnan(result.latest["val/nan"])
    assert result.latest["val/inf"] == np.inf


@pytest.mark.parametrize(
    ("data", "steps", "total"),
    [
        ([1.0, 1.0, 1.0], None, 3),
        ([1.0, 1.0, 1.0], 2, 2),
        ([1.0], 3, 1),
        (itertools.repeat(1.0), 2, 2),
        (iter([1.0]), None, None),
        (SizedData([1.0], TypeError("no length")), None, None),
    ],
    ids=["all", "some", "fewer", "endless", "iterator", "no length"],
)
def test_an_evaluation_reports_its_beginning_and_each_batch(data, steps, total):
    class Reports(Observer):
        def progress(self, *report):
            reports.append(report)

    reports = []
    engine = Engine(train, [Evaluate(mean, data, name="test", steps=steps)])
    engine.on("run_begin")(lambda loop: loop.observe(Reports()))
    engine.run({"params": jnp.float32(0)}, [1], epochs=1)
    assert reports == [("test", done, total) for done in range((total or 1) + 1)]


def test_it_shows_itself_as_the_call_that_made_it():
    assert repr(Evaluate(mean, [1.0])) == "Evaluate(mean, [1.0])"
    assert repr(Evaluate(mean, [1.0], name="test", when=2, steps=1)) == (
        "Evaluate(mean, [1.0], name='test', when=2, steps=1)"
    )


def test_weight_that_is_no_metric_is_refused_before_the_first_step():
    evaluate = Evaluate(lambda state, batch: {"loss": 1.0}, [1], weight="examples")
    with pytest.raises(ValueError, match=r"needs the metric 'examples' as the weight of a batch.* returns \['loss'\]"):
        Engine(lambda state, batch: (state, {}), [evaluate]).run(0, [1, 2], epochs=1)


def test_using_without_apply_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"'val' needs using= to have apply\(loop\), such as an EMA, got 'ema'"):
        Evaluate(lambda state, batch: {"loss": 1.0}, [1], using="ema")
