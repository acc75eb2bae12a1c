"""Means, records and history: values are exact and recorded at their own steps."""

import itertools
import math
import random

import flax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics
from onstep import Callback, Engine, improves
from onstep.callbacks import Checkpoint
from onstep.means import Mean
from onstep.metrics import Windows


def step(state, batch):
    return state, {"loss": batch}


def run(values, **options):
    engine = Engine(step, log_every=options.pop("log_every", 4))
    return engine.run(jnp.float32(0), [np.float32(v) for v in values], **(options or {"epochs": 1})).history


def test_log_window_is_the_mean_of_its_steps_and_the_last_may_be_partial():
    history = run(range(10))
    assert history["train/loss"] == [1.5, 5.5, 8.5]
    assert history.steps("train/loss") == [4, 8, 10]
    assert history["epoch/loss"] == [4.5]


def test_log_window_may_span_two_epochs():
    history = run(range(6), epochs=2)
    assert history["train/loss"] == [1.5, 2.5, 3.5]
    assert history["epoch/loss"] == [2.5, 2.5]


def test_mean_equals_that_of_the_exact_sum():
    values = [np.float32(10.0 ** random.Random(7 * n).uniform(-8, 8)) for n in range(500)]
    assert run(values)["epoch/loss"] == [math.fsum(map(float, values)) / 500]


def test_mean_of_a_long_window_takes_little_memory():
    values = [random.Random(n).uniform(-1, 1) * 10.0 ** (n % 30 - 15) for n in range(5000)]
    mean = Mean()
    mean.add(values)
    assert len(mean.terms) < 10
    assert mean.value("x") == math.fsum(values) / len(values)


def test_mean_does_not_depend_on_how_often_it_was_saved_and_restored():
    values = [random.Random(n).uniform(-1, 1) * 10.0 ** (n % 30 - 15) for n in range(3000)]
    for every in (1, 7, 1000):
        tally = Mean()
        for start in range(0, len(values), every):
            tally.add(values[start : start + every])
            tally = Mean.from_state(tally.get_state())
        assert tally.value("x") == math.fsum(values) / len(values)
        assert len(tally.terms) < 40


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.nan, 2.0], math.nan),
        ([math.inf, 1.0], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([1e308, 1e308], math.inf),
    ],
    ids=str,
)
def test_nan_and_infinity_survive_any_number_of_saves(values, expected):
    for tally in (Mean(), Mean()):
        for value in values:
            tally.add([value])
            tally = Mean.from_state(tally.get_state())
        assert tally.value("x") == pytest.approx(expected, nan_ok=True)


def test_nonfinite_loss_is_recorded_at_its_step():
    history = run([1, 1, 1, math.nan, 1, 1, 1, 1, math.inf], log_every=2)
    assert history["train/loss"] == pytest.approx([1, math.nan, 1, 1, math.inf], nan_ok=True)


def test_mean_counts_only_the_steps_that_have_the_metric():
    class Sometimes(Callback):
        update_when = 3

        def update(self, carry, ctx):
            return carry, ctx.log(seen=ctx.metrics["loss"])

    engine = Engine(step, [Sometimes()], log_every=4)
    history = engine.run(jnp.float32(0), [np.float32(v) for v in range(1, 13)], epochs=1).history
    assert list(zip(history.steps("train/seen"), history["train/seen"], strict=True)) == [(4, 3), (8, 6), (12, 10.5)]
    assert history["epoch/seen"] == [7.5]


@flax.struct.dataclass
class Scores(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


def scored(state, batch):
    outputs = {"loss": batch["x"], "logits": batch["logits"], "labels": batch["labels"]}
    return state, Scores.single_from_model_output(**outputs)


def batches(sizes):
    generator = np.random.default_rng(0)
    for size in sizes:
        logits, labels = generator.normal(size=(size, 3)), generator.integers(0, 3, size)
        yield {"x": generator.normal(size=size).astype(np.float32), "logits": logits, "labels": labels}


def test_clu_collection_is_weighted_by_examples():
    data = list(batches([8, 8, 8, 8]))
    history = Engine(scored, log_every=3).run(jnp.float32(0), data, epochs=1).history
    right = [np.argmax(b["logits"], -1) == b["labels"] for b in data]
    assert history["train/accuracy"] == pytest.approx([np.concatenate(right[:3]).mean(), right[3].mean()])
    assert history["epoch/loss"] == pytest.approx([np.concatenate([b["x"] for b in data]).mean()])


def test_partial_clu_window_continues_when_resumed(tmp_path):
    def history(directory, *targets):
        for target in targets:
            engine = Engine(scored, [Checkpoint(directory)], log_every=100)
            found = engine.run(jnp.float32(0), list(batches([8] * 6)), steps=target).history
        return found

    whole, cut = history(tmp_path / "whole", 6), history(tmp_path / "cut", 4, 6)
    assert cut["epoch/accuracy"] == whole["epoch/accuracy"]
    assert cut["epoch/loss"] == whole["epoch/loss"]
    assert cut["train/loss"] == whole["train/loss"]


def test_closing_a_window_empties_the_pending_metrics():
    meter = Windows()
    meter.pending += [{"a": 1.0}, {"a": 3.0, "b": 5.0}]
    assert meter.take_means("train") == {"train/a": 2.0, "train/b": 5.0}
    assert meter.pending == []
    assert meter.take_means("epoch") == {"epoch/a": 2.0, "epoch/b": 5.0}
    assert meter.take_means("epoch") == {}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_ties_nan_and_infinities_never_improve(mode):
    values = [1.0, -2.0, 0.0, math.nan, math.inf, -math.inf]
    for value, best in itertools.product(values, [None, *values[:3]]):
        better = best is None or (value < best if mode == "min" else value > best)
        assert improves(value, best, mode=mode) == (better and math.isfinite(value))


def test_improvement_must_exceed_min_delta():
    assert improves(0.75, 0.0, mode="max", min_delta=0.5)
    assert not improves(0.5, 0.0, mode="max", min_delta=0.5)
    assert not improves(-0.5, 0.0, min_delta=0.5)


def test_logged_values_reach_every_callback_at_once():
    records = []

    class Sink(Callback):
        def on_log(self, loop, record):
            records.append((self.name, record.step, record.epoch, dict(record.values), dict(loop.latest)))

    one, two = Sink(), Sink()
    one.name, two.name = "one", "two"
    engine = Engine(step, [one, two], log_every=100)

    @engine.on("step_end", when=2)
    def measure(loop):
        loop.log({"here": jnp.float32(loop.step), "there": np.int64(1)})
        assert loop.latest["here"] == loop.step
        assert len(records) == loop.step

    engine.run(jnp.float32(0), range(3), epochs=1)
    values = {"here": 2.0, "there": 1.0}
    assert records[:2] == [("one", 2, 0, values, values), ("two", 2, 0, values, values)]


def test_logging_nothing_makes_no_record():
    engine = Engine(lambda state, batch: (state, {}))
    engine.on("log")(lambda loop, record: pytest.fail("a record without values"))
    engine.on("step_end")(lambda loop: loop.log({}))
    assert len(engine.run(jnp.float32(0), range(60), epochs=1).history) == 0
