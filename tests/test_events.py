"""The order of events, as complete lists that users may rely on."""

import contextlib

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, every
from onstep.testing import RaiseIn, Restore, Transcript


def show(loop, event):
    """Show the batch before a step and the state after it."""
    if event == "step_begin":
        return f"batch={loop.batch}"
    return f"state={int(loop.state)}" if event == "step_end" else ""


def transcript(name, lines, *quiet, when=1):
    return Transcript(name, lines=lines, quiet=quiet, show=show, when=when)


class Score(Callback):
    """Log a value at the end of every epoch, as an evaluation does."""

    when = every(epochs=1)

    def on_step_end(self, loop):
        loop.log({"val/score": float(loop.state)})


def step(state, batch):
    return state + batch, {"loss": batch * 1.0}


def run(callbacks, data=(1, 2, 3), **options):
    return Engine(step, callbacks, log_every=2).run(jnp.int32(0), list(data), **options)


TWO_EPOCHS = """
A load 0/0
B load 0/0
A run_begin 0/0
B run_begin 0/0
A epoch_begin 0/0
B epoch_begin 0/0
A step_begin 0/0 batch=1
B step_begin 0/0 batch=1
A step_end 1/0 state=1
B step_end 1/0 state=1
A save 1/0
B save 1/0
A step_begin 1/0 batch=2
B step_begin 1/0 batch=2
A step_end 2/0 state=3
B step_end 2/0 state=3
A log 2/0 train/loss=1.5
B log 2/0 train/loss=1.5
A save 2/0
B save 2/0
A step_begin 2/0 batch=3
B step_begin 2/0 batch=3
A step_end 3/1 state=6
A log 3/1 val/score=6
B log 3/1 val/score=6
B step_end 3/1 state=6
A log 3/1 epoch/loss=2
B log 3/1 epoch/loss=2
A epoch_end 3/1
B epoch_end 3/1
A save 3/1
B save 3/1
A epoch_begin 3/1
B epoch_begin 3/1
A step_begin 3/1 batch=1
B step_begin 3/1 batch=1
A step_end 4/1 state=7
B step_end 4/1 state=7
A log 4/1 train/loss=2
B log 4/1 train/loss=2
A save 4/1
B save 4/1
A step_begin 4/1 batch=2
B step_begin 4/1 batch=2
A step_end 5/1 state=9
B step_end 5/1 state=9
A save 5/1
B save 5/1
A step_begin 5/1 batch=3
B step_begin 5/1 batch=3
A step_end 6/2 state=12
A log 6/2 val/score=12
B log 6/2 val/score=12
B step_end 6/2 state=12
A log 6/2 train/loss=2.5
B log 6/2 train/loss=2.5
A log 6/2 epoch/loss=2
B log 6/2 epoch/loss=2
A epoch_end 6/2
B epoch_end 6/2
A save 6/2
B save 6/2
A snapshot 6/2
B snapshot 6/2
B run_end 6/2
A run_end 6/2
"""


@pytest.mark.parametrize("source", [list, tuple], ids=["list", "tuple"])
def test_events_of_two_epochs_come_in_this_order(source):
    lines = []
    engine = Engine(step, [transcript("A", lines), Score(), transcript("B", lines)], log_every=2)
    engine.run(jnp.int32(0), source([1, 2, 3]), epochs=2)
    assert lines == TWO_EPOCHS.strip().splitlines()


def test_end_of_an_epoch_of_unknown_length_comes_after_everything_else_of_its_last_step():
    lines = []
    engine = Engine(step, [transcript("A", lines), Score()], log_every=3)
    engine.run(jnp.int32(0), lambda epoch: iter([1, 2, 3]), epochs=1)
    assert lines[lines.index("A step_begin 2/0 batch=3") : lines.index("A snapshot 3/1")] == [
        "A step_begin 2/0 batch=3",
        "A step_end 3/0 state=6",
        "A log 3/0 train/loss=2",
        "A log 3/1 val/score=6",
        "A log 3/1 epoch/loss=2",
        "A epoch_end 3/1",
        "A save 3/1",
    ]


def test_second_run_has_the_same_events():
    lines = []
    engine = Engine(step, [transcript("A", lines), Score(), transcript("B", lines)], log_every=2)
    for _ in range(2):
        engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
    assert lines == 2 * TWO_EPOCHS.strip().splitlines()


def test_stop_within_an_epoch_saves_without_an_epoch_end():
    lines = []
    first = transcript("S", lines, "step_begin", "epoch_begin", "load", "log")
    engine = Engine(step, [first, transcript("A", lines, "step_begin", "load")], log_every=3)

    @engine.on("step_end", when=every(5))
    def enough(loop):
        loop.stop("enough")

    result = engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
    assert (result.step, result.epoch, result.stopped) == (5, 1, "enough")
    assert lines[lines.index("A epoch_begin 3/1") :] == [
        "A epoch_begin 3/1",
        "S step_end 4/1 state=7",
        "A step_end 4/1 state=7",
        "S save 4/1",
        "A save 4/1",
        "S step_end 5/1 state=9",
        "A step_end 5/1 state=9",
        "S save 5/1",
        "A save 5/1",
        "S snapshot 5/1",
        "A snapshot 5/1",
        "A log 5/1 train/loss=1.5",
        "A run_end 5/1",
        "S run_end 5/1",
    ]


def test_run_ends_with_a_save_for_every_callback_and_the_partial_log_window():
    lines = []
    run([transcript("A", lines, when=every(100))], data=[1] * 9, steps=3)
    assert lines == [
        "A load 0/0",
        "A run_begin 0/0",
        "A epoch_begin 0/0",
        "A log 2/0 train/loss=1",
        "A save 3/0",
        "A snapshot 3/0",
        "A log 3/0 train/loss=1",
        "A run_end 3/0",
    ]


def test_stop_in_step_begin_prevents_the_step():
    lines = []
    engine = Engine(step, [transcript("A", lines, "load", "save")])
    engine.on("step_begin", when=every(2))(lambda loop: loop.stop("no further"))
    result = engine.run(jnp.int32(0), [1, 2, 3], epochs=1)
    assert (result.step, int(result.state)) == (1, 1)
    assert lines[-5:] == [
        "A step_end 1/0 state=1",
        "A step_begin 1/0 batch=2",
        "A snapshot 1/0",
        "A log 1/0 train/loss=1",
        "A run_end 1/0",
    ]


def test_error_reaches_on_exception_then_on_run_end_in_reverse():
    lines = []
    callbacks = [
        transcript("A", lines, "step_begin", "load"),
        RaiseIn("step_end", RuntimeError("trouble"), step=2),
        transcript("B", lines, "load"),
    ]
    with pytest.raises(RuntimeError, match="trouble") as caught:
        run(callbacks, epochs=1)
    assert caught.value.__notes__ == ["onstep: raised by RaiseIn.on_step_end at step 2"]
    assert lines[lines.index("A step_end 2/0 state=3") :] == [
        "A step_end 2/0 state=3",
        "A exception 2/0 RuntimeError",
        "B exception 2/0 RuntimeError",
        "B run_end 2/0",
        "A run_end 2/0",
    ]


EVENTS = [
    "on_load",
    "on_run_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_step_end",
    "on_log",
    "on_epoch_end",
    "on_save",
    "on_snapshot",
]


@pytest.mark.parametrize("event", [*EVENTS, "on_run_end"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_error_in_any_event_reaches_the_caller_and_every_callback_that_began_ends(event, kind):
    lines, error = [], kind("trouble")
    with pytest.raises(kind, match="trouble") as caught:
        run([transcript("A", lines), RaiseIn(event, error), transcript("B", lines)], epochs=1)
    assert caught.value is error
    assert any(f"RaiseIn.{event} at step" in note for note in error.__notes__)
    for name in "AB":
        began = sum(line.startswith((f"{name} load", f"{name} run_begin")) for line in lines) > 0
        assert sum(line.startswith(f"{name} run_end") for line in lines) == began
    assert any(line.startswith("A exception") for line in lines) == (event != "on_run_end")


def test_first_of_several_errors_is_raised_with_the_others_as_notes():
    callbacks = [RaiseIn("on_run_end", ValueError("third")), RaiseIn("on_exception", OSError("second"))]
    with pytest.raises(RuntimeError, match="first") as caught:
        run([*callbacks, RaiseIn("on_step_end", RuntimeError("first"))], epochs=1)
    notes = "\n".join(caught.value.__notes__)
    assert "OSError was also raised: second" in notes
    assert "ValueError was also raised: third" in notes
    assert notes.index("second") < notes.index("third")


def test_error_in_the_step_ends_the_callbacks():
    lines = []

    def broken(state, batch):
        raise ZeroDivisionError("in the step")

    with pytest.raises(ZeroDivisionError, match="in the step"):
        Engine(broken, [transcript("A", lines, "load", "step_begin")]).run(jnp.int32(0), [1], epochs=1)
    assert lines == ["A run_begin 0/0", "A epoch_begin 0/0", "A exception 0/0 ZeroDivisionError", "A run_end 0/0"]


def test_uncompiled_run_has_the_same_events():
    compiled, uncompiled = [], []
    for lines, jit in ((compiled, True), (uncompiled, False)):
        engine = Engine(step, [transcript("A", lines), Score(), transcript("B", lines)], log_every=2, jit=jit)
        engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
    assert compiled == uncompiled == TWO_EPOCHS.strip().splitlines()


def test_iterating_yields_before_the_callbacks_save():
    lines = []
    engine = Engine(step, [transcript("A", lines, "load", "step_begin")], log_every=2)
    with engine.steps(jnp.int32(0), [1, 2, 3], epochs=1, when=every(2) | every(epochs=1)) as steps:
        for loop in steps:
            lines.append(f"loop body {loop.step}")
    assert steps.result.step == 3
    assert lines == [
        "A run_begin 0/0",
        "A epoch_begin 0/0",
        "A step_end 1/0 state=1",
        "A save 1/0",
        "A step_end 2/0 state=3",
        "A log 2/0 train/loss=1.5",
        "loop body 2",
        "A save 2/0",
        "A step_end 3/1 state=6",
        "A log 3/1 epoch/loss=2",
        "A epoch_end 3/1",
        "loop body 3",
        "A save 3/1",
        "A snapshot 3/1",
        "A log 3/1 train/loss=3",
        "A run_end 3/1",
    ]


def test_stop_iteration_is_reported_with_the_place_where_it_was_raised():
    def end(*args):
        next(iter(()))

    engine = Engine(step)
    engine.on("step_end", when=2)(end)
    with pytest.raises(RuntimeError, match=r"A StopIteration ended the run: raised by end.on_step_end at step 2"):
        engine.run(jnp.int32(0), [1, 2, 3], epochs=1)
    with (
        pytest.raises(RuntimeError, match="raised by the step, or by the body of the `for`, at step 1"),
        Engine(step).steps(jnp.int32(0), [1, 2], epochs=1) as steps,
    ):
        next(map(end, steps))
    with pytest.raises(RuntimeError, match="A StopIteration ended the run: raised by the step <lambda>"):
        Engine(lambda state, batch: end()).run(jnp.int32(0), [1], epochs=1)


def test_error_that_is_caught_inside_the_with_leaves_a_run_that_can_be_resumed():
    def numbers():
        yield from (1, 2)
        raise OSError("disk gone")

    lines = []
    engine = Engine(step, [transcript("A", lines, "save")])
    with engine.steps(jnp.int32(0), numbers(), epochs=1) as steps, contextlib.suppress(OSError):
        for _ in steps:
            pass
    assert lines[-2:] == ["A exception 2/0 OSError", "A run_end 2/0"]
    assert (steps.result.step, steps.result.stopped, int(steps.result.state)) == (2, "OSError: disk gone", 3)
    assert int(engine.run(steps.result, iter([1, 2, 3]), epochs=1).state) == 6


def test_keyboard_interrupt_that_is_caught_inside_the_with_leaves_a_run_that_can_be_resumed():
    engine = Engine(step)
    with engine.steps(jnp.int32(0), [1, 2, 3], epochs=1) as steps, contextlib.suppress(KeyboardInterrupt):
        for loop in steps:
            if loop.step == 2:
                raise KeyboardInterrupt
    assert (steps.result.step, int(steps.result.state)) == (2, 3)
    assert int(engine.run(steps.result, [1, 2, 3], epochs=1).state) == 6


def test_window_whose_record_was_lost_is_recorded_by_the_rerun():
    """A run that was killed after its last save, before the record of the last window."""
    kill = RaiseIn("log", KeyboardInterrupt(), step=3)
    first = Engine(step, [kill], log_every=2)
    with first.steps(jnp.int32(0), [1, 2, 3], steps=3) as steps, contextlib.suppress(KeyboardInterrupt):
        for _ in steps:
            pass
    assert steps.result.history["train/loss"] == [1.5]
    lines = []
    engine = Engine(step, [Restore(steps.result), Transcript(lines=lines)], log_every=2)
    rerun = engine.run(jnp.int32(0), [1, 2, 3], steps=3)
    assert [line for line in lines if "log" in line] == ["log 3/1 train/loss=3"]
    assert (rerun.latest["train/loss"], len(rerun.history)) == (3.0, 0)  # a record of the session before


def test_cadence_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"has no effect on on_log: it governs on_step_begin, on_step_end, on_save"):
        Engine(step).on("log", when=5)(lambda loop, record: None)

    class Logs(Callback):
        def __init__(self, when):
            self.when = when

        def on_epoch_end(self, loop):
            pass

    with pytest.raises(ValueError, match=r"Logs.when=every\(epochs=5\) has no effect on on_epoch_end"):
        Engine(step, [Logs(every(epochs=5))])


def test_decorator_without_an_event_is_refused():
    with pytest.raises(TypeError, match=r'write @engine.on\("step_end"\), got count'):

        @Engine(step).on
        def count(loop):
            pass
