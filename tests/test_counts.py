"""The number of steps, epochs and events of a run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from onstep import Callback, Engine, every
from onstep.testing import Transcript, same_bytes
from onstep.testing import counting_step as add


def test_loop_counts_steps_epochs_and_steps_of_the_current_epoch():
    counts = []
    engine = Engine(add)

    @engine.on("step_end")
    def note(loop):
        counts.append((loop.step, loop.epoch, loop.epoch_step))

    result = engine.run(jnp.int32(0), [1, 1], epochs=2)
    assert counts == [(1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0)]
    assert (result.step, result.epoch, result.stopped) == (4, 2, None)


@pytest.mark.parametrize(
    ("length", "targets", "step", "epoch"),
    [
        pytest.param(4, {"epochs": 3}, 12, 3, id="epochs"),
        pytest.param(20, {"steps": 8}, 8, 0, id="steps within the first epoch"),
        pytest.param(20, {"steps": 73}, 73, 3, id="steps within a later epoch"),
        pytest.param(20, {"steps": 40}, 40, 2, id="steps at the end of an epoch"),
        pytest.param(4, {"steps": 10, "epochs": 2}, 8, 2, id="epochs before steps"),
        pytest.param(4, {"steps": 6, "epochs": 2}, 6, 1, id="steps before epochs"),
        pytest.param(4, {"steps": 8, "epochs": 2}, 8, 2, id="both at once"),
        pytest.param(4, {"steps": 0}, 0, 0, id="nothing to do"),
    ],
)
def test_run_ends_at_the_target_reached_first(length, targets, step, epoch):
    result = Engine(add).run(jnp.int32(0), [1] * length, **targets)
    assert (int(result.state), result.step, result.epoch) == (step, step, epoch)


@pytest.mark.parametrize(("steps", "ends"), [(4, [3]), (3, [3]), (2, [])], ids=["beyond", "at its end", "within"])
def test_epoch_ends_only_if_all_its_steps_ran(steps, ends):
    transcript = Transcript()
    Engine(add, [transcript]).run(jnp.int32(0), [1, 1, 1], steps=steps)
    assert transcript.steps("epoch_end") == ends


def test_logs_evaluations_and_saves_keep_their_own_cadence():
    lines = []

    class Save(Callback):
        when = 10

        def on_save(self, loop):
            lines.append(("save", loop.step))

    class Validate(Callback):
        when = 5

        def on_step_end(self, loop):
            loop.log({"val/loss": 0.0})

        def on_log(self, loop, record):
            lines.append((next(iter(record.values)), record.step))

    Engine(add, [Save(), Validate()], log_every=3).run(jnp.int32(0), [1] * 8, epochs=3)
    assert [step for what, step in lines if what == "train/loss"] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [step for what, step in lines if what == "val/loss"] == [5, 10, 15, 20]
    assert [step for what, step in lines if what == "save"] == [10, 20, 24]
    assert [what for what, step in lines if step == 15] == ["val/loss", "train/loss"]
    assert [what for what, step in lines if step == 24] == ["train/loss", "epoch/loss", "save"]


@pytest.mark.parametrize("when", [every(epochs=1), 2, 100], ids=repr)
def test_run_that_ends_within_an_epoch_saves_once_at_its_end(when):
    transcript = Transcript(when=when)
    Engine(add, [transcript]).run(jnp.int32(0), [1, 1, 1], steps=2)
    assert transcript.steps("save") == [2]


def test_data_are_asked_once_for_each_batch_and_once_for_each_end():
    asked = []

    class Source:
        def __iter__(self):
            for batch in (1, 2, 3):
                asked.append("batch")
                yield batch
            asked.append("end")

    result = Engine(add).run(jnp.int32(0), Source(), epochs=2)
    assert asked == ["batch", "batch", "batch", "end"] * 2
    assert (result.step, result.epoch) == (6, 2)


@pytest.mark.parametrize(
    ("length", "epoch_steps", "epochs", "passes"),
    [(10, 10, 4, 4), (100, 50, 5, 3), (10, 15, 5, 8), (10, 3, 1, 1)],
    ids=["epochs are passes", "epochs are halves", "epochs are longer", "one short epoch"],
)
def test_epoch_steps_starts_a_pass_over_the_data_only_when_needed(length, epoch_steps, epochs, passes):
    opened = []

    class Source:
        def __iter__(self):
            opened.append(1)
            return iter([1] * length)

    result = Engine(add).run(jnp.int32(0), Source(), epochs=epochs, epoch_steps=epoch_steps)
    assert (result.step, len(opened)) == (epochs * epoch_steps, passes)


def test_step_number_is_the_same_everywhere():
    seen = []
    engine = Engine(lambda state, batch: (state + 1, {"count": state + 1}), log_every=1)

    @engine.on("log")
    def log(loop, record):
        if "train/count" in record.values:
            seen.append((record.step, loop.step, int(loop.state), int(loop.metrics["count"])))

    @engine.on("save")
    def save(loop):
        seen.append((loop.step, loop.snapshot().step, int(loop.state), int(loop.batch)))

    result = engine.run(jnp.int32(0), [1, 2, 3], epochs=1)
    assert seen == [(n, n, n, n) for n in (1, 1, 2, 2, 3, 3)]
    assert result.history.steps("train/count") == result.history["train/count"] == [1, 2, 3]


def test_record_names_say_what_they_average():
    result = Engine(add, log_every=2).run(jnp.int32(0), [1, 2, 3], epochs=1)
    assert dict(result.history) == {"train/loss": [1.5, 3], "epoch/loss": [2]}
    assert result.history.steps("train/loss") == [2, 3]


@pytest.mark.parametrize("target", [{"epochs": 4}, {"steps": 8}], ids=str)
def test_resumed_run_continues_to_an_absolute_target(target):
    epochs = []
    engine = Engine(add)

    @engine.on("epoch_begin")
    def note(loop):
        epochs.append(loop.epoch)

    first = engine.run(jnp.int32(0), [1, 2], epochs=2)
    second = engine.run(first, [1, 2], **target)
    assert epochs == [0, 1, 2, 3]
    assert (second.step, second.epoch, int(second.state)) == (8, 4, 12)
    assert int(first.state) == 6


def test_target_already_reached_runs_no_step_and_says_so(capsys):
    transcript = Transcript(quiet=["load", "snapshot"])
    engine = Engine(add, [transcript])
    first = engine.run(jnp.int32(0), [1] * 12, epochs=3)
    transcript.lines.clear()
    again = engine.run(first, [1] * 12, steps=36)
    assert transcript.lines == ["run_begin 36/3", "run_end 36/3"]
    assert (again.step, int(again.state), dict(again.history)) == (36, 36, {})
    said = capsys.readouterr().err
    assert "already at step 36 of 36" in said
    assert "nothing to do" in said


def test_epoch_in_progress_counts_against_a_target_in_epochs():
    engine = Engine(add)
    first = engine.run(jnp.int32(0), [1, 1, 1], steps=4)
    with pytest.raises(ValueError, match=r"at epoch 2, beyond the target of 1 epoch\."):
        engine.run(first, [1, 1, 1], epochs=1)


# Steps with their own counters: gradient accumulation, and networks that alternate.


def accumulating(every_k, updates):
    """Return a step whose optimizer averages `every_k` gradients, with a learning rate that falls to 0."""
    schedule = optax.linear_schedule(1.0, 0.0, updates)
    optimizer = optax.MultiSteps(optax.sgd(schedule), every_k)

    def step(state, batch):
        weight, optimizer_state = state
        gradient = jax.grad(lambda w: w * batch)(weight)
        change, optimizer_state = optimizer.update(gradient, optimizer_state, weight)
        metrics = {"micro": optimizer_state.mini_step, "update": optimizer_state.gradient_step}
        return (weight + change, optimizer_state), metrics

    weight = jnp.float32(0)
    return step, (weight, optimizer.init(weight))


def test_gradient_accumulation_continues_across_epochs():
    step, state = accumulating(4, updates=5)
    counts = []
    engine = Engine(step)

    @engine.on("step_end")
    def note(loop):
        counts.append((loop.step, int(loop.metrics["micro"]), int(loop.metrics["update"])))

    result = engine.run(state, [float(n) for n in range(10)], epochs=2)
    assert counts == [(n, n % 4, n // 4) for n in range(1, 21)]
    batches = np.tile(np.arange(10.0), 2).reshape(5, 4)
    rates = np.array([1.0, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(result.state[0], -(rates * batches.mean(1)).sum(), rtol=1e-6)


def test_partly_accumulated_gradient_survives_a_stop():
    step, state = accumulating(4, updates=5)
    data = [float(n) for n in range(10)]
    whole = Engine(step).run(state, data, epochs=2)
    engine = Engine(step)
    part = engine.run(state, data, steps=6)
    assert part.state[1].mini_step == 2
    assert part.state[1].acc_grads == (4 + 5) / 2
    rest = engine.run(part, data, epochs=2)
    assert same_bytes(rest.state, whole.state)


def test_two_optimizers_keep_their_own_counters_under_one_step_counter():
    schedule = {"d": optax.linear_schedule(1.0, 0.0, 36), "g": optax.linear_schedule(1.0, 0.0, 18)}
    optimizers = {name: optax.sgd(schedule[name]) for name in schedule}

    def descend(name, state):
        weight, optimizer_state = state
        change, optimizer_state = optimizers[name].update(jnp.float32(1), optimizer_state)
        return weight + change, optimizer_state

    def step(state, batch):
        d = descend("d", state["d"])
        g = jax.lax.cond(state["step"] % 2 == 1, lambda g: descend("g", g), lambda g: g, state["g"])
        return {"d": d, "g": g, "step": state["step"] + 1}, {"d": d[0], "g": g[0]}

    state = {name: (jnp.float32(0), optimizers[name].init(jnp.float32(0))) for name in optimizers}
    result = Engine(step, log_every=1).run(state | {"step": 0}, itertools.repeat(0), steps=36)
    assert result.step == result.state["step"] == optax.tree.get(result.state["d"][1], "count") == 36
    assert optax.tree.get(result.state["g"][1], "count") == 18
    assert result.history.steps("train/d") == list(range(1, 37))
    sums = {name: -sum(float(schedule[name](n)) for n in range(count)) for name, count in (("d", 36), ("g", 18))}
    np.testing.assert_allclose([result.state["d"][0], result.state["g"][0]], [sums["d"], sums["g"]], rtol=1e-5)
