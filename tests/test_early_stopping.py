"""EarlyStopping: the decision alone, and in runs with scripted values."""

import math

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, at, every, improves
from onstep.callbacks import EarlyStopping, Evaluate
from onstep.snapshot import unpack
from onstep.testing import LogValues, RaiseIn, Restore, StopAt

NAN, INF = math.nan, math.inf


def scripted(values, metric="val/loss"):
    """Return a callback that logs one value of the list after each step; None logs nothing."""
    return LogValues({step: {metric: value} for step, value in enumerate(values, 1) if value is not None})


def step(state, batch):
    return state + batch, {"loss": state}


def idle(state, batch):
    """Change and return nothing: these tests are about the scripted values."""
    return state, {}


def run(callbacks, steps):
    return Engine(idle, callbacks).run(jnp.int32(0), [1] * steps, steps=steps)


def stops_at(stopper, values):
    """Return the number, from 1, of the value at which patience runs out; None if it never does."""
    return next((number for number, value in enumerate(values, 1) if stopper.stalled(value)), None)


TABLE = [
    pytest.param("max", 2, 0, [1.0, 0.8, 0.88], 3, id="two misses in a row, max"),
    pytest.param("max", 2, 0, [1.0, 0.8, 1.2], None, id="an improvement just in time, max"),
    pytest.param("max", 1, 0, [42, 42], 2, id="plateau, max, patience 1"),
    pytest.param("max", 4, 0, [0.047] * 10, 5, id="plateau, max, patience 4"),
    pytest.param("min", 3, 0, [0.5] * 10, 4, id="plateau, min, patience 3"),
    pytest.param("min", 5, 0, [1.0] * 8, 6, id="plateau, min, patience 5"),
    pytest.param("min", 5, 0, [8, 7, 6, 5, 4, 3, 2, 1], None, id="better every time"),
    pytest.param(
        "max", 3, 0, [1.0, 0.8, 1.2, 1.5, 0.9, 1.0, 0.99, 1.1, 0.9], 7, id="a new best starts the count again"
    ),
    pytest.param("max", 5, 0, [1.0, 0.8, 1.2, 1.23, 0.9, 1.0, 1.1, 1.253, 1.26, 1.2], None, id="a new best in time"),
    pytest.param("min", 3, 0, [6, 5, 5, 5, 5, 5], 5, id="equal to the best is a miss, patience 3"),
    pytest.param("min", 1, 0, [6, 5, 4, 4, 3, 3], 4, id="equal to the best is a miss, patience 1"),
    pytest.param("min", 3, 0, [8, 4, 2, 3, 4, 5, 8, 10], 6, id="worse and worse"),
    pytest.param("min", 3, 0, [0.4, 0.3, 0.28, 0.25, 0.26, 0.25, 0.25, 0.25], 7, id="back to the best, patience 3"),
    pytest.param("min", 4, 0, [0.4, 0.3, 0.28, 0.25, 0.26, 0.25, 0.25, 0.25], 8, id="back to the best, patience 4"),
    pytest.param("min", 1, 0, [10, 9, 8, 9, 8.9, 8.8, 8.7, 8.6, 8.5], 4, id="better than the last, patience 1"),
    pytest.param("min", 2, 0, [10, 9, 8, 9, 8.9, 8.8, 8.7, 8.6, 8.5], 5, id="better than the last, patience 2"),
    pytest.param("min", 3, 0, [10, 9, 8, 9, 8.9, 8.8, 8.7, 8.6, 8.5], 6, id="better than the last, patience 3"),
    pytest.param("min", 3, 0, [4, 3, 2, 2, 2, 2], 6, id="patience counts from the first value that is no better"),
    pytest.param("max", 2, 0.1, [1, 2, 2.01, 3, 3.01, 3.02], 6, id="min_delta, max"),
    pytest.param("min", 2, 0.1, [1.1, 0.95, 0.94, 0.93], 4, id="min_delta, min"),
    pytest.param("max", 3, 1, [90, 91, 92, 88, 89, 90], 6, id="exactly min_delta is a miss"),
    pytest.param("min", 3, 0.05, [0.4, 0.38, 0.31, 0.25, 0.27, 0.24, 0.25, 0.25], 7, id="min_delta, min, patience 3"),
    pytest.param("min", 4, 0.05, [0.4, 0.38, 0.31, 0.25, 0.27, 0.24, 0.25, 0.25], 8, id="min_delta, min, patience 4"),
    pytest.param("max", 3, 0.05, [0.25, 0.3, 0.32, 0.38, 0.39, 0.41, 0.39, 0.39], 7, id="min_delta, max, patience 3"),
    pytest.param("max", 4, 0.05, [0.25, 0.3, 0.32, 0.38, 0.39, 0.41, 0.39, 0.39], 8, id="min_delta, max, patience 4"),
    pytest.param("max", 2, 0.4, [0, 0.3, 0.6], None, id="small gains add up, as the best stays"),
    pytest.param("max", 3, 0.5, [1, 1.4, 1.8, 2.2], None, id="creeping upwards by less than min_delta"),
    pytest.param("min", 2, 0, [NAN, 0.5, 0.4], None, id="NaN first does not become the best"),
    pytest.param("max", 2, 0, [1, NAN, 0.5, 0.4], 3, id="NaN in the middle is a miss"),
    pytest.param("min", 2, 0, [1, NAN, 0.5, NAN, 0.4], None, id="NaN now and then"),
    pytest.param("min", 2, 0, [NAN, NAN, NAN], 2, id="nothing but NaN"),
    pytest.param("min", 2, 0, [1.0, -INF, 0.5, 0.4], None, id="minus infinity is no improvement, min"),
    pytest.param("max", 2, 0, [1.0, INF, INF], 3, id="infinity is no improvement, max"),
    pytest.param("min", 3, 0, [INF, 3, 2, 4, 4, 4], 6, id="infinity first does not become the best"),
    pytest.param("min", 2, 0, [0.0, 0.1, 0.2], 3, id="a best of zero, min"),
    pytest.param("max", 2, 0, [-1.0, 0.0, -0.5, -0.4], 4, id="a best of zero, max"),
    pytest.param("min", 3, 0, [0.0, 0.0, 0.0, 0.0], 4, id="nothing but zero"),
    pytest.param("max", 2, 0, [-10, -10.5, -11], 3, id="negative scores"),
]


@pytest.mark.parametrize(("mode", "patience", "min_delta", "values", "expected"), TABLE)
def test_patience_runs_out_at_this_value(mode, patience, min_delta, values, expected):
    stopper = EarlyStopping("val/loss", patience=patience, mode=mode, min_delta=min_delta)
    assert stops_at(stopper, values) == expected


@pytest.mark.parametrize(("mode", "patience", "min_delta", "values", "expected"), TABLE)
def test_run_stops_at_this_step(mode, patience, min_delta, values, expected):
    stopper = EarlyStopping("val/loss", patience=patience, mode=mode, min_delta=min_delta)
    result = Engine(idle, [scripted(values), stopper]).run(
        jnp.int32(0), lambda epoch: iter([1] * 20), steps=len(values)
    )
    assert result.step == (expected or len(values))
    assert (result.stopped is not None) == (expected is not None)


@pytest.mark.parametrize(
    ("value", "best", "better"),
    [
        pytest.param(0.75, 0.0, True, id="by more than min_delta"),
        pytest.param(0.5, None, True, id="the first value"),
        pytest.param(0.5, 0.0, False, id="by exactly min_delta"),
        pytest.param(0.2, 0.5, False, id="worse"),
        pytest.param(NAN, None, False, id="NaN as the first value"),
        pytest.param(NAN, 0.0, False, id="NaN"),
        pytest.param(INF, None, False, id="infinity as the first value"),
        pytest.param(INF, 0.0, False, id="infinity"),
    ],
)
def test_improvement_is_finite_and_exceeds_min_delta(value, best, better):
    assert improves(value, best, mode="max", min_delta=0.5) == better
    mirrored = None if best is None else -best
    assert improves(-value, mirrored, mode="min", min_delta=0.5) == better


def test_best_value_stays_until_min_delta_is_exceeded():
    stopper = EarlyStopping("val/score", patience=3, mode="max", min_delta=0.5)
    seen = []
    for value in [1, 1.4, 1.8, 2.2]:
        stopper.stalled(value)
        seen.append((stopper.best, stopper.misses))
    assert seen == [(1, 0), (1, 1), (1.8, 0), (1.8, 1)]


def test_result_says_why_the_run_stopped():
    result = run([scripted([3.0, 0.5, 0.6, 0.7, 0.1]), EarlyStopping("val/loss", patience=2)], 5)
    assert result.step == 4
    assert result.stopped == "val/loss has not fallen below 0.5 in 2 evaluations (mode='min')"


def test_run_that_does_not_stop_early_has_no_reason():
    result = run([scripted([3, 2, 1]), EarlyStopping("val/loss", patience=1)], 3)
    assert (result.step, result.stopped) == (3, None)


def test_patience_counts_evaluations_and_not_steps():
    script = scripted([None, None, 1.0, None, None, 2.0, None, None, 3.0, None, None, 4.0])
    result = run([script, EarlyStopping("val/loss", patience=2)], 12)
    assert result.step == 9


def test_records_of_other_metrics_are_not_counted():
    stopper = EarlyStopping("val/loss", patience=2)
    run([scripted([1.0, 2.0, None, None, None]), scripted([5.0] * 5, "val/other"), stopper], 5)
    assert (stopper.best, stopper.misses) == (1.0, 1)


def test_epoch_mean_of_a_training_metric_can_be_watched():
    def constant(state, batch):
        return state, {"loss": jnp.float32(2.0)}

    result = Engine(constant, [EarlyStopping("epoch/loss", patience=2)]).run(jnp.int32(0), [1] * 4, epochs=9)
    assert (result.epoch, result.step) == (3, 12)
    assert result.history["epoch/loss"] == [2.0, 2.0, 2.0]


def test_device_scalar_can_be_watched():
    result = run([scripted([jnp.float32(1), jnp.float32(2), jnp.float32(3)]), EarlyStopping("val/loss", patience=1)], 3)
    assert result.step == 2


@pytest.mark.parametrize("first", ["stopper", "script"])
def test_stop_does_not_depend_on_the_place_in_the_list(first):
    callbacks = [scripted([1.0, 2.0, 3.0, 4.0]), EarlyStopping("val/loss", patience=2)]
    result = run(callbacks if first == "script" else callbacks[::-1], 4)
    assert result.step == 3


@pytest.mark.parametrize("order", [1, -1], ids=["hasty first", "patient first"])
def test_first_of_two_stoppers_to_run_out_of_patience_ends_the_run(order):
    scripts = [scripted([1, 2, 3, 4, 5, 6]), scripted([6, 5, 4, 3, 2, 1], "val/error")]
    stoppers = [EarlyStopping("val/loss", patience=2), EarlyStopping("val/error", patience=2)]
    result = run([*scripts, *stoppers[::order]], 6)
    assert result.step == 3
    assert result.stopped.startswith("val/loss has not ")


def test_two_stoppers_of_one_metric_count_separately():
    stoppers = [
        EarlyStopping("val/loss", patience=4),
        EarlyStopping("val/loss", patience=2, min_delta=1.0, name="steep"),
    ]
    result = run([scripted([5.0, 4.5, 4.2, 4.1]), *stoppers], 4)
    assert result.step == 3
    assert [(stopper.best, stopper.misses) for stopper in stoppers] == [(4.2, 0), (5.0, 2)]


def test_stop_is_final_and_a_resume_runs_no_step(capsys):
    engine = Engine(idle, [scripted([1, 2, 3, 4, 5, 6, 7, 8]), EarlyStopping("val/loss", patience=2)])
    data = [1] * 4
    result = engine.run(jnp.int32(0), data, epochs=1)
    again = engine.run(result, data, epochs=2)
    assert (result.step, again.step) == (3, 3)
    assert again.stopped == result.stopped
    assert "ended with a final stop at step 3" in capsys.readouterr().err


def test_stop_is_final_for_an_engine_that_restores_the_run():
    result = run([scripted([1, 2, 3]), EarlyStopping("val/loss", patience=1)], 3)
    again = run([Restore(result), scripted([1, 2, 3]), EarlyStopping("val/loss", patience=1)], 3)
    assert (again.step, again.stopped) == (2, result.stopped)


def test_resumed_run_continues_to_count():
    values = [3, 2, 1, 4, 5, 6, 7]
    engine = Engine(idle, [scripted(values), EarlyStopping("val/loss", patience=3)])
    result = engine.run(jnp.int32(0), [1] * 7, steps=4)
    result = engine.run(result, [1] * 7, steps=7)
    assert (result.step, result.stopped) == (6, "val/loss has not fallen below 1 in 3 evaluations (mode='min')")


@pytest.mark.parametrize("cut", range(7))
def test_state_can_be_moved_to_another_stopper(cut):
    values = [5, 4, NAN, 3, 3, 4, 2]
    first, second = EarlyStopping("val/loss", patience=2), EarlyStopping("val/loss", patience=2)
    before = stops_at(first, values[:cut])
    second.set_state(first.get_state())
    after = stops_at(second, values[cut:])
    assert before == 6 if cut >= 6 else cut + after == 6


@pytest.mark.parametrize("first", ["stopper", "script"])
def test_snapshot_holds_the_count_of_its_own_step(first):
    saved = []

    class Save(Callback):
        def on_save(self, loop):
            saved.append(unpack(loop.snapshot().host)["callbacks"]["EarlyStopping"])

    callbacks = [scripted([3, 4, 2]), EarlyStopping("val/loss", patience=5)]
    run([Save(), *(callbacks if first == "script" else callbacks[::-1])], 3)
    assert [(state["best"], state["misses"]) for state in saved] == [(3, 0), (3, 1), (2, 0)]


def test_second_run_starts_from_scratch():
    engine = Engine(idle, [scripted([1, 2, 3, 4]), EarlyStopping("val/loss", patience=2)])
    first, second = (engine.run(jnp.int32(0), [1] * 4, epochs=1) for _ in range(2))
    assert (first.step, second.step) == (3, 3)
    assert first.stopped == second.stopped


def test_stopper_starts_from_scratch_in_another_engine():
    stopper = EarlyStopping("val/loss", patience=2)
    first = run([scripted([1, 2, 3, 4]), stopper], 4)
    second = run([scripted([9, 8, 7, 8]), stopper], 4)
    assert (first.step, second.step, second.stopped) == (3, 4, None)
    assert (stopper.best, stopper.misses) == (7, 1)


def test_best_value_set_before_the_run_is_a_baseline_for_every_run():
    stopper = EarlyStopping("val/loss", patience=5)
    stopper.best = 0.5
    engine = Engine(idle, [scripted([0.9, 0.8, 0.7, 0.71, 0.72, 0.73]), stopper])
    assert [engine.run(jnp.int32(0), [1] * 6, epochs=1).step for _ in range(2)] == [5, 5]


def test_metric_that_never_appears_is_a_warning_at_its_first_sibling_and_at_the_end():
    engine = Engine(step, [scripted([1.0] * 6, "val/accuracy"), EarlyStopping("val/loss", patience=2)])
    with pytest.warns(UserWarning, match="EarlyStopping watches 'val/loss'") as warned:
        result = engine.run(jnp.int32(0), [1] * 2, epochs=3)
    assert result.step == 6  # nothing is lost
    assert [str(warning.message).partition("hold ")[2] for warning in warned] == [
        "['val/accuracy']. Add Evaluate(...) or watch one of these.",
        "['epoch/loss', 'train/loss', 'val/accuracy']. Add Evaluate(...) or watch one of these.",
    ]
    assert {warning.filename for warning in warned} == {__file__}  # the user's line


def test_missing_metric_is_warned_about_once():
    engine = Engine(idle, [scripted([None] * 5 + [1.0]), EarlyStopping("val/loss", patience=2)])
    with pytest.warns(UserWarning, match="watches 'val/loss'") as warned:
        engine.run(jnp.int32(0), [1] * 2, epochs=3)
    assert len(warned) == 1


def test_metric_that_appears_in_the_first_epoch_causes_no_warning():
    script = scripted([None, 1.0, None, None])
    result = Engine(idle, [script, EarlyStopping("val/loss", patience=2)]).run(jnp.int32(0), [1] * 2, epochs=2)
    assert result.step == 4


def test_metric_of_a_later_evaluation_causes_no_warning():
    evaluate = Evaluate(lambda state, batch: {"loss": 1.0}, [1], when=every(epochs=2))
    result = Engine(idle, [evaluate, EarlyStopping("val/loss", patience=3)]).run(jnp.int32(0), [1] * 2, epochs=4)
    assert result.history.steps("val/loss") == [4, 8]


def test_metric_that_a_later_evaluation_did_not_record_is_a_warning():
    evaluate = Evaluate(lambda state, batch: {"loss": 1.0}, [1], when=every(epochs=2))
    engine = Engine(idle, [evaluate, EarlyStopping("val/acc", patience=3, mode="max")])
    with pytest.warns(UserWarning, match=r"watches 'val/acc', but the records hold .*'val/loss'\]"):
        engine.run(jnp.int32(0), [1] * 2, epochs=2)


def test_metric_that_the_first_evaluation_did_not_record_is_a_warning():
    evaluate = Evaluate(lambda state, batch: {"loss": 1.0}, [1])
    engine = Engine(idle, [evaluate, EarlyStopping("val/acc", patience=3, mode="max")])
    engine.on("step_end", when=at(3))(lambda loop: loop.log({"val/acc": 1.0}))
    with pytest.warns(UserWarning, match=r"watches 'val/acc', but the records hold .*'val/loss'\]"):
        engine.run(jnp.int32(0), [1] * 2, epochs=2)


def test_training_window_longer_than_an_epoch_causes_no_warning():
    engine = Engine(step, [EarlyStopping("train/loss", patience=3)], log_every=3)
    assert engine.run(jnp.int32(0), [1] * 2, epochs=3).history.steps("train/loss") == [3, 6]


def test_misspelt_training_metric_is_a_warning():
    engine = Engine(step, [EarlyStopping("train/lss", patience=3)], log_every=3)
    engine.on("step_end", when=at(3))(lambda loop: loop.log({"train/lss": 1.0}))
    with pytest.warns(UserWarning, match="watches 'train/lss'"):
        engine.run(jnp.int32(0), [1] * 2, epochs=2)


def test_metric_that_appeared_before_a_resume_is_enough():
    engine = Engine(idle, [scripted([1.0, None, None]), EarlyStopping("val/loss", patience=2)])
    result = engine.run(jnp.int32(0), [1] * 3, steps=2)
    assert engine.run(result, [1] * 3, steps=3).step == 3


def test_missing_metric_does_not_hide_the_error_that_ended_the_run():
    failing = RaiseIn("step_end", RuntimeError("another failure"), step=3)
    engine = Engine(idle, [EarlyStopping("val/loss", patience=2), failing])
    with pytest.raises(RuntimeError, match="another failure") as error:
        engine.run(jnp.int32(0), [1] * 3, epochs=1)
    assert not any("val/loss" in note for note in error.value.__notes__)


@pytest.mark.parametrize("final", [True, False])
def test_run_may_stop_before_the_metric_appears(final):
    stop = StopAt(2, reason="a signal", final=final)
    engine = Engine(idle, [EarlyStopping("val/loss", patience=2), stop])
    assert engine.run(jnp.int32(0), [1] * 3, epochs=1).stopped == "a signal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"patience": 0}, "needs patience to be a whole number >= 1.* got 0", id="patience 0"),
        pytest.param({"patience": -1}, "needs patience to be a whole number >= 1.* got -1", id="negative patience"),
        pytest.param({"patience": 2.0}, "needs patience to be a whole number >= 1.* got 2.0", id="float patience"),
        pytest.param({"patience": True}, "needs patience to be a whole number >= 1.* got True", id="bool patience"),
        pytest.param({"patience": 1, "mode": "auto"}, "needs mode 'min' or 'max', got 'auto'", id="unknown mode"),
        pytest.param(
            {"patience": 1, "min_delta": -0.1}, "needs a finite min_delta >= 0, got -0.1", id="negative min_delta"
        ),
        pytest.param({"patience": 1, "min_delta": NAN}, "needs a finite min_delta >= 0, got nan", id="NaN min_delta"),
        pytest.param(
            {"patience": 1, "min_delta": INF}, "needs a finite min_delta >= 0, got inf", id="infinite min_delta"
        ),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match="EarlyStopping " + message):
        EarlyStopping("val/loss", **arguments)


def test_evaluations_may_have_any_cadence():
    engine = Engine(idle, [EarlyStopping("val/loss", patience=3)])
    engine.on("step_end", when=every(4) | every(epochs=1))(lambda loop: loop.log({"val/loss": loop.step}))
    result = engine.run(jnp.int32(0), [1] * 6, epochs=3)
    assert result.history.steps("val/loss") == [4, 6, 8, 12]
    assert result.step == 12


@pytest.mark.parametrize(
    ("stopping", "text"),
    [
        pytest.param(EarlyStopping("val/loss", patience=3), "EarlyStopping('val/loss', patience=3)", id="defaults"),
        pytest.param(
            EarlyStopping("val/acc", patience=1, mode="max", min_delta=0.1),
            "EarlyStopping('val/acc', patience=1, mode='max', min_delta=0.1)",
            id="more",
        ),
    ],
)
def test_repr_reads_like_the_call(stopping, text):
    stopping.stalled(0.5)  # the state of a run is no part of it
    assert repr(stopping) == text


@pytest.mark.parametrize("metric", ["val/accuracy", "eval/top_5_acc", "f1"])
def test_lower_accuracy_as_better_is_a_warning(metric):
    with pytest.warns(UserWarning, match="Pass mode='max' if higher is better") as warned:
        EarlyStopping(metric, patience=1)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("metric", "mode"), [("val/accuracy", "max"), ("accuracy_loss", "min"), ("val/loss", "min")])
def test_fitting_mode_causes_no_warning(metric, mode):
    EarlyStopping(metric, patience=1, mode=mode)


def test_reason_names_the_direction_and_what_was_not_reached():
    engine = Engine(
        idle, [scripted([0.5, 0.4, 0.55]), EarlyStopping("val/loss", patience=2, mode="max", min_delta=0.1)]
    )
    reason = "val/loss has not risen above 0.5 by more than 0.1 in 2 evaluations (mode='max')"
    assert engine.run(jnp.int32(0), [1] * 3, epochs=1).stopped == reason


def test_misspelt_name_is_a_warning_before_the_first_step_if_an_evaluation_has_announced_others():
    evaluate = Evaluate(lambda state, batch: {"loss": 1.0, "accuracy": 0.5}, [1], when=every(epochs=5))
    engine = Engine(idle, [EarlyStopping("val/los", patience=3), evaluate, StopAt(1)])
    message = r"watches 'val/los', but the records hold \['val/accuracy', 'val/loss'\]. Did you mean val/loss"
    with pytest.warns(UserWarning, match=message):
        assert engine.run(jnp.int32(0), [1] * 4, epochs=9).step == 1


@pytest.mark.parametrize(("arguments", "error"), [((5,), TypeError), (("loss", "x"), ValueError)])
def test_argument_of_the_wrong_type_is_refused(arguments, error):
    metric, *min_delta = arguments
    with pytest.raises(error, match="EarlyStopping needs"):
        EarlyStopping(metric, patience=1, min_delta=min_delta[0] if min_delta else 0.0)
