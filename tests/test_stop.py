"""Stops: which handlers still run, what is counted, and what can be resumed."""

import itertools
import signal

import jax
import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, at, every
from onstep.processes import ProcessGroup
from onstep.testing import RaiseIn, StopAt, Transcript
from onstep.testing import counting_step as add


class Ends(Callback):
    """Collect the error, or None, with which each run ended."""

    def __init__(self):
        self.errors = []

    def on_run_end(self, loop):
        self.errors.append(loop.error)


def transcript(name=None, *, lines=None, when=1):
    """Write down the events whose order and number these tests compare."""
    quiet = ("load", "run_begin", "step_begin", "snapshot", "exception", "run_end")
    return Transcript(name, lines=lines, quiet=quiet, when=when)


def lines_at(step, lines):
    return [line.replace(f" {step}/0", "") for line in lines if f" {step}/0" in line]


@pytest.mark.parametrize("final", [True, False], ids=["final", "resumable"])
@pytest.mark.parametrize(
    ("event", "step", "epoch"),
    [
        ("run_begin", 0, 0),
        ("epoch_begin", 4, 1),
        ("step_begin", 5, 1),
        ("step_end", 5, 1),
        ("log", 6, 1),
        ("epoch_end", 4, 1),
    ],
)
def test_stop_from_any_event_ends_the_run_at_that_step(event, step, epoch, final):
    events, ends = transcript(when=100), Ends()
    engine = Engine(add, [ends, events], log_every=3)

    @engine.on(event)
    def stop(loop, *record):
        if loop.step == step:
            loop.stop("enough", final=final)

    result = engine.run(jnp.int32(0), [1, 1, 1, 1], epochs=3)
    assert (int(result.state), result.step, result.epoch, result.stopped) == (step, step, epoch, "enough")
    assert events.steps("save") == ([step] if step else [])
    assert events.steps("epoch_end") == ([4] if epoch else [])
    assert ends.errors == [None]


@pytest.mark.parametrize(("final", "windows"), [(True, [3, 5]), (False, [3])], ids=["final", "resumable"])
def test_partial_log_window_is_recorded_only_after_a_final_stop(final, windows):
    engine = Engine(add, [StopAt(5, final=final)], log_every=3)
    result = engine.run(jnp.int32(0), [1, 2, 3, 4, 5, 6], epochs=1)
    assert result.history.steps("train/loss") == windows


def test_partial_log_window_of_a_resumable_stop_continues_when_resumed():
    engine = Engine(add, [StopAt(5, final=False)], log_every=3)
    part = engine.run(jnp.int32(0), [1, 2, 3, 4, 5, 6], epochs=1)
    rest = engine.run(part, [1, 2, 3, 4, 5, 6], epochs=1)
    assert dict(rest.history) == {"train/loss": [5], "epoch/loss": [3.5]}


def test_handlers_due_at_the_step_of_a_stop_still_run():
    lines = []
    callbacks = [transcript("before", lines=lines), StopAt(2), transcript("after", lines=lines)]
    Engine(add, callbacks).run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert lines_at(2, lines) == [
        "before step_end",
        "after step_end",
        "before save",
        "after save",
        "before log train/loss=1",
        "after log train/loss=1",
    ]


def test_all_step_begin_handlers_run_although_the_first_stops_the_run():
    asked = []
    engine = Engine(add)

    @engine.on("step_begin")
    def stop(loop):
        loop.stop("enough")

    @engine.on("step_begin")
    def after(loop):
        asked.append(loop.step)

    assert engine.run(jnp.int32(0), [1, 1], epochs=1).step == 0
    assert asked == [0]


def test_stop_saves_once_for_every_callback_whatever_its_cadence():
    lines = []
    callbacks = [transcript("often", lines=lines), transcript("rare", lines=lines, when=every(epochs=9)), StopAt(2)]
    Engine(add, callbacks).run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert [line for line in lines if " save " in line] == ["often save 1/0", "often save 2/0", "rare save 2/0"]


def test_stop_within_an_epoch_does_not_complete_the_epoch():
    events = transcript()
    result = Engine(add, [events, StopAt(5)]).run(jnp.int32(0), [1] * 12, epochs=1)
    assert (result.step, result.epoch) == (5, 0)
    assert events.steps("step_end") == [1, 2, 3, 4, 5]
    assert events.steps("epoch_end") == []
    assert "epoch/loss" not in result.history


def test_stop_at_the_last_step_of_an_epoch_completes_the_epoch():
    events = transcript()
    result = Engine(add, [events, StopAt(3)]).run(jnp.int32(0), [1, 1, 1], epochs=9)
    assert (result.step, result.epoch) == (3, 1)
    assert events.steps("epoch_end") == [3]
    assert result.history["epoch/loss"] == [1]


def test_stop_ends_a_run_over_endless_data():
    assert Engine(add, [StopAt(5)]).run(jnp.int32(0), itertools.repeat(1), steps=100).step == 5


def test_first_of_two_stops_decides():
    callbacks = [StopAt(1, reason="first", final=False), StopAt(1, reason="second")]
    engine = Engine(add, callbacks)
    result = engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert result.stopped == "first"
    assert engine.run(result, [1, 1, 1], epochs=1).step == 3


class Pair(ProcessGroup):
    """Two processes, of which the other one requests a stop at step 2."""

    other = None

    def __init__(self, clock):
        super().__init__(clock)
        self.count = 2

    def begin(self, position):
        pass

    def should_stop(self):
        return False

    def agree_on_stop(self, step, requested):
        return requested or (self.other if step == 2 else None)


def run_in_pair(monkeypatch, callbacks, other=None):
    monkeypatch.setattr("onstep.loop.ProcessGroup", Pair)
    monkeypatch.setattr(Pair, "other", other)
    return Engine(add, callbacks, mesh=jax.make_mesh((8,), ("data",))).run(jnp.int32(0), [1] * 4, epochs=1)


def test_first_of_two_stops_decides_before_the_processes_agree(monkeypatch):
    callbacks = [StopAt(1, reason="first", final=False), StopAt(1, reason="second")]
    result = run_in_pair(monkeypatch, callbacks)
    assert (result.stopped, result.step) == ("first", 1)


def test_processes_agree_on_a_stop_before_they_save(monkeypatch):
    class Saves(Callback):
        def on_save(self, loop):
            saved.append((loop.step, loop.stopped))

    saved = []
    assert run_in_pair(monkeypatch, [Saves()], other=("elsewhere", False)).step == 2
    assert saved == [(1, None), (2, "elsewhere")]


def test_stop_does_not_carry_over_to_the_next_run():
    engine = Engine(add, [StopAt(2)])
    first = engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    second = engine.run(jnp.int32(0), [1], epochs=1)
    assert (first.stopped, second.stopped, second.step) == ("StopAt(2)", None, 1)


def test_resuming_a_finally_stopped_result_runs_no_step_and_says_so(capsys):
    engine = Engine(add, [StopAt(2, reason="enough")])
    first = engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    again = engine.run(first, [1, 1, 1], epochs=5)
    assert (again.step, int(again.state), again.stopped) == (2, 2, "enough")
    assert "ended with a final stop at step 2 (enough)" in capsys.readouterr().err


def test_run_can_be_stopped_after_a_save_has_failed():
    engine, stopped = Engine(add), []

    @engine.on("save")
    def fail(loop):
        raise OSError("disk full")

    @engine.on("exception")
    def stop(loop, error):
        loop.stop("no disk")
        stopped.append(loop.stopped)

    with pytest.raises(OSError, match="disk full") as raised:
        engine.run(0, [1, 2], epochs=1)
    assert stopped == ["no disk"]
    assert len(raised.value.__notes__) == 1


def test_final_stop_in_on_save_is_refused():
    engine = Engine(add)
    engine.on("save")(lambda loop: loop.stop("enough"))
    with pytest.raises(RuntimeError, match="A final loop.stop is too late in on_save. Call it in on_step_end"):
        engine.run(jnp.int32(0), [1, 1, 1], epochs=1)


def test_resumable_stop_in_on_save_ends_the_run_at_that_step():
    engine = Engine(add)

    @engine.on("save", when=2)
    def stop(loop):
        loop.stop("later", final=False)

    result = engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert (result.step, result.stopped) == (2, "later")


def test_changes_in_the_loop_body_are_saved():
    saved = []

    class Save(Callback):
        def on_save(self, loop):
            saved.append((loop.step, int(loop.state), loop.latest.get("mine"), loop.stopped))

    with Engine(add, [Save()]).steps(jnp.int32(0), [1, 1, 1], epochs=1) as steps:
        for loop in steps:
            loop.log({"mine": loop.step})
            if loop.step == 2:
                loop.state = loop.state + 10
                loop.stop("enough")
    assert saved == [(1, 1, 1.0, None), (2, 12, 2.0, "enough")]


def test_resuming_finishes_the_interrupted_epoch(capsys):
    events, data = transcript(), list(range(10))
    engine = Engine(add, [events, StopAt(13, final=False)])
    first = engine.run(jnp.int32(0), data, epochs=5)
    rest = engine.run(first, data, epochs=5)
    assert (rest.step, rest.epoch, int(rest.state), rest.stopped) == (50, 5, 5 * sum(data), None)
    assert events.steps("epoch_end") == [10, 20, 30, 40, 50]
    assert "resuming from step 13" in capsys.readouterr().err


def test_events_of_an_interrupted_run_add_up_to_those_of_an_uninterrupted_run():
    whole, parts, stops = transcript(when=7), transcript(when=7), []
    data = list(range(10))
    Engine(add, [whole], log_every=4).run(jnp.int32(0), data, epochs=3)
    engine = Engine(add, [parts], log_every=4)

    @engine.on("step_end", when=at(6, 12, 18, 24))
    def interrupt(loop):
        loop.stop("every sixth step", final=False)

    result = engine.run(jnp.int32(0), data, epochs=3)
    while result.step < 30:
        stops.append(result.step)
        result = engine.run(result, data, epochs=3)
    assert stops == [6, 12, 18, 24]
    extra = [f"save {step}/{step // 10}" for step in stops]
    assert [line for line in parts.lines if line not in extra] == whole.lines


def test_resumable_stop_at_the_target_still_records_the_last_window():
    engine = Engine(add, [StopAt(4, final=False, reason="enough")], log_every=3)
    result = engine.run(jnp.int32(0), [1, 2, 3, 4], epochs=1)
    assert (result.step, result.stopped) == (4, "enough")
    assert result.history["train/loss"] == [2, 4]


# The same while iterating over `engine.steps`.


def test_iterating_yields_at_each_due_step():
    engine = Engine(add)
    with engine.steps(jnp.int32(0), [1, 1, 1, 1], epochs=2, when=every(3) | every(epochs=1)) as steps:
        seen = [(loop.step, int(loop.state)) for loop in steps]
    assert seen == [(3, 3), (4, 4), (6, 6), (8, 8)]
    assert (steps.result.step, steps.result.epoch, steps.result.stopped) == (8, 2, None)


def test_iterating_can_yield_at_the_ends_of_epochs():
    engine = Engine(add)
    with engine.steps(jnp.int32(0), iter([1, 1, 1]), epochs=1, when=every(epochs=1)) as steps:
        assert [(loop.step, loop.epoch) for loop in steps] == [(3, 1)]


def test_breaking_out_of_the_iteration_is_a_resumable_stop():
    events, ends = transcript(when=100), Ends()
    engine = Engine(add, [events, ends])
    with engine.steps(jnp.int32(0), [1, 2, 3, 4], epochs=1) as steps:
        for loop in steps:
            if loop.step == 2:
                break
    assert (steps.result.step, steps.result.stopped) == (2, "the for loop was left early")
    assert (events.steps("save"), ends.errors) == ([2], [None])
    assert int(engine.run(steps.result, [1, 2, 3, 4], epochs=1).state) == 10


def test_second_iteration_continues_where_the_first_was_left():
    with Engine(add).steps(jnp.int32(0), [1, 1, 1, 1], epochs=1) as steps:
        first = next(loop.step for loop in steps)
        rest = [loop.step for loop in steps]
    assert (first, rest, steps.result.stopped) == (1, [2, 3, 4], None)


def test_stop_in_the_loop_body_is_final():
    engine = Engine(add)
    with engine.steps(jnp.int32(0), [1, 2, 3, 4], epochs=1) as steps:
        for loop in steps:
            if loop.step == 3:
                loop.stop("good enough")
    assert (steps.result.step, steps.result.stopped) == (3, "good enough")
    assert engine.run(steps.result, [1, 2, 3, 4], epochs=1).step == 3


def test_error_in_the_loop_body_ends_the_run_and_is_raised_unchanged():
    heard, ends, error = [], Ends(), KeyError("mine")
    engine = Engine(add, [ends])
    engine.on("exception")(lambda loop, error: heard.append((loop.step, error)))
    steps = engine.steps(jnp.int32(0), [1, 1, 1], epochs=1)

    def train():
        with steps:
            for loop in steps:
                if loop.step == 2:
                    raise error

    with pytest.raises(KeyError, match="mine") as caught:
        train()
    assert caught.value is error
    assert (heard, ends.errors, steps.result) == ([(2, error)], [error], None)


def test_error_in_a_callback_is_raised_once_while_iterating():
    heard = []
    engine = Engine(add, [RaiseIn("step_end", OSError("disk gone"))])

    @engine.on("exception")
    def hear(loop, error):
        heard.append(str(error))

    with pytest.raises(OSError, match="disk gone"), engine.steps(jnp.int32(0), [1, 1], epochs=1) as steps:
        list(steps)
    assert heard == ["disk gone"]


def test_steps_that_are_never_iterated_run_no_step_and_draw_no_batch():
    drawn, ends = [], Ends()
    engine = Engine(add, [ends])
    with engine.steps(jnp.int32(7), (drawn.append(n) for n in range(9)), epochs=1) as steps:
        pass
    assert (steps.result.step, int(steps.result.state), drawn, ends.errors) == (0, 7, [], [None])
    assert steps.result.stopped == "the for loop was left early"


@pytest.mark.parametrize("after", [False, True], ids=["without it", "after it"])
def test_iterating_outside_the_with_block_is_refused(after):
    steps = Engine(add).steps(jnp.int32(0), [1], epochs=1)
    if after:
        with steps:
            pass
    with pytest.raises(RuntimeError, match="needs a with"):
        next(iter(steps))


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_interrupt_during_a_call_leaves_the_state_that_the_call_returned(steps_per_call):
    engine = Engine(add, steps_per_call=steps_per_call)
    states = []
    engine.on("exception")(lambda loop, error: states.append((loop.step, int(loop.state))))
    call = engine._compiled.call

    def interrupted_call(*args):
        results = call(*args)
        signal.raise_signal(signal.SIGINT)
        return results

    interrupted_call.trace = call.trace
    engine._compiled.call = interrupted_call
    with pytest.raises(KeyboardInterrupt):
        engine.run(jnp.int32(0), [1] * 8, epochs=1)
    assert states == [(steps_per_call, steps_per_call)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_interrupt_during_a_call_is_raised_at_once():
    engine, seen = Engine(add, steps_per_call=1), []
    call = engine._compiled.call

    def interrupted_call(*args):
        signal.raise_signal(signal.SIGINT)
        seen.append("first")
        signal.raise_signal(signal.SIGINT)
        seen.append("second")
        return call(*args)

    interrupted_call.trace = call.trace
    engine._compiled.call = interrupted_call
    with pytest.raises(KeyboardInterrupt):
        engine.run(jnp.int32(0), [1], epochs=1)
    assert seen == ["first"]


def test_interrupt_while_the_data_is_drawn_is_raised_at_once():
    def numbers():
        yield 1
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    seen = []
    engine = Engine(add, steps_per_call=1)
    engine.on("exception")(lambda loop, error: seen.append((loop.step, int(loop.state))))
    with pytest.raises(KeyboardInterrupt):
        engine.run(jnp.int32(0), numbers(), steps=3)
    assert seen == [(1, 1)]
