"""Signals and deadlines: what still runs, what is saved, what `run` raises, and which handlers are restored."""

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from models import epoch, fresh_state, step
from onstep import Engine
from onstep.callbacks import Checkpoint, EarlyStopping, Evaluate, GracefulExit
from onstep.testing import (
    EVENT_NAMES,
    FakeClock,
    FakeLoader,
    FakeLoaderIterator,
    RaiseIn,
    SizedData,
    StopAt,
    Transcript,
    counting_step,
    same_bytes,
)

ENDS = {signal.SIGTERM: (SystemExit, r"^143\n"), signal.SIGINT: (KeyboardInterrupt, r"^\n")}  # and then a note
BOTH = pytest.mark.parametrize("number", list(ENDS), ids=lambda number: number.name)
PLACES = pytest.mark.parametrize("place", [0, 1], ids=["listed first", "listed last"])


@pytest.fixture(autouse=True)
def plain_handlers():
    """Each test begins with the handlers of a new process, and restores the previous ones."""
    before = {number: signal.getsignal(number) for number in ENDS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in ENDS]


def saves_and_ends():
    """A transcript of every save and end. A save is due only at the end of a run."""
    return Transcript(quiet=[event for event in EVENT_NAMES if event not in ("save", "run_end")], when=100)


def send(engine, event, number, at=0):
    """Raise the signal in an event at a step."""

    @engine.on(event)
    def sender(loop, *record):
        if loop.step == at:
            signal.raise_signal(number)


def interrupted(engine, number=signal.SIGINT, data=(1, 1, 1, 1), **to):
    """Run until the signal is passed on."""
    error, match = ENDS[number]
    with pytest.raises(error, match=match):
        engine.run(jnp.int32(0), data, **(to or {"epochs": 3}))


@BOTH
@PLACES
@pytest.mark.parametrize(
    ("event", "at", "saved"),
    [
        ("load", 0, []),
        ("run_begin", 0, []),
        ("epoch_begin", 4, [4]),
        ("step_begin", 5, [5]),
        ("step_end", 5, [5]),
        ("log", 6, [6]),
        ("epoch_end", 4, [4]),
        ("save", 5, [5]),
        ("run_end", 12, [12]),
    ],
)
def test_a_signal_in_any_event_ends_the_run_there_and_is_passed_on(event, at, saved, place, number):
    transcript, before = saves_and_ends(), handlers()
    callbacks = [transcript]
    callbacks.insert(place, GracefulExit())
    engine = Engine(counting_step, callbacks, log_every=3)
    send(engine, event, number, at)
    interrupted(engine, number)
    assert transcript.lines == [*(f"save {n}/{n // 4}" for n in saved), f"run_end {at}/{at // 4}"]
    assert handlers() == before


@BOTH
def test_a_signal_in_the_step_lets_the_step_end(number):
    transcript = saves_and_ends()

    def step(state, batch):
        if state == 2:
            signal.raise_signal(number)
        return counting_step(state, batch)

    interrupted(Engine(step, [transcript, GracefulExit()], jit=False), number)
    assert transcript.lines == ["save 3/0", "run_end 3/0"]


def test_a_signal_during_compilation_ends_the_run_before_its_first_step():
    transcript = saves_and_ends()

    def traced(state, batch):
        signal.raise_signal(signal.SIGINT)
        return counting_step(state, batch)

    interrupted(Engine(traced, [transcript, GracefulExit()]))
    assert transcript.lines == ["run_end 0/0"]


def test_a_signal_during_an_evaluation_lets_it_finish():
    transcript = saves_and_ends()

    def data():
        yield 1
        signal.raise_signal(signal.SIGINT)
        yield 3

    evaluate = Evaluate(lambda state, batch: {"batch": batch * 1.0}, lambda number: data(), when=2)
    engine = Engine(counting_step, [transcript, evaluate, GracefulExit()])
    means = []
    engine.on("save")(lambda loop: means.append(loop.latest.get("val/batch")))
    interrupted(engine)
    assert (transcript.lines, means) == (["save 2/0", "run_end 2/0"], [None, 2.0])


# While the run waits for a batch.


@BOTH
@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"steps_per_call": 8}, {"prefetch": 2}], ids=str)
@pytest.mark.parametrize("when", [1, 100], ids=["host at every step", "host never"])
def test_a_signal_ends_the_wait_for_a_batch(when, options, number):
    transcript, live = Transcript(quiet=set(EVENT_NAMES) - {"save", "run_end"}, when=when), queue.Queue()
    for _ in range(3):
        live.put(1)

    def stream():
        while True:
            if live.empty():
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            yield live.get(timeout=30)

    engine = Engine(counting_step, [transcript, GracefulExit()], **options)
    with contextlib.ExitStack() as stack:
        if "prefetch" in options:
            stack.enter_context(pytest.MonkeyPatch.context()).setattr("onstep.data.prefetch.PATIENCE", 0.05)
            stack.enter_context(pytest.warns(UserWarning, match=r"waited more than 0.05 s .* \(generator\)"))
        interrupted(engine, number, data=stream(), steps=7)
    live.put(1)  # lets the thread end
    assert transcript.steps("save")[-1] == 3
    assert transcript.lines[-1] == "run_end 3/0"


class Changing(FakeLoaderIterator):
    """Changes its state first, and then is interrupted at its sixth batch, unless it has been before."""

    def __next__(self):
        self.next += 1
        if self.next == 6 and not self.loader.sought:
            signal.raise_signal(signal.SIGINT)
        if self.next > len(self.loader.batches):
            raise StopIteration
        return self.loader.batches[self.next - 1]


class ChangingLoader(FakeLoader):
    def __iter__(self):
        return Changing(self)


class SizedChangingLoader(ChangingLoader):
    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize("kind", [ChangingLoader, SizedChangingLoader], ids=["without len", "with len"])
@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("when", [1, 4])
def test_loader_that_changes_its_state_before_it_waits_resumes_exactly(when, steps_per_call, kind, capsys):
    signal.signal(signal.SIGINT, lambda *args: None)
    engine = Engine(counting_step, [GracefulExit()], steps_per_call=steps_per_call)
    engine.on("step_end", when=when)(lambda loop: None)
    part = engine.run(jnp.int32(0), kind(range(1, 10)), epochs=1)
    assert (part.step, part.stopped, int(part.state)) == (5, "SIGINT", 15)
    again = kind(range(1, 10))
    again.sought.append(None)
    whole = engine.run(part, again, epochs=1)
    assert (whole.step, int(whole.state), len(again.sought)) == (9, 45, 2)
    err = capsys.readouterr().err
    assert "ended with a final stop" not in err


@pytest.mark.parametrize(("steps_per_call", "drawn"), [(1, 3), (8, 4)])
@pytest.mark.parametrize("one_shot", [False, True], ids=["callable", "iterator"])
def test_data_that_was_interrupted_is_read_from_a_new_iterator(one_shot, steps_per_call, drawn):
    signal.signal(signal.SIGINT, lambda *args: None)

    def data(number):
        yield from [1, 2]
        if not transcript.lines:
            signal.raise_signal(signal.SIGINT)
        yield from [3, 4]

    transcript = saves_and_ends()
    engine = Engine(counting_step, [transcript, GracefulExit()], steps_per_call=steps_per_call)
    source = data(0) if one_shot else data
    part = engine.run(jnp.int32(0), source, epochs=1)
    assert transcript.lines == ["save 2/0", "run_end 2/0"]
    if one_shot:
        with pytest.raises(ValueError, match="generator was interrupted while it waited for a batch. Pass a new one"):
            engine.run(part, source, epochs=1)
    assert int(engine.run(part, data(0) if one_shot else data, epochs=1).state) == 10


def test_a_signal_while_the_first_batch_is_drawn_runs_no_step():
    class Interrupting(SizedData):
        def __iter__(self):
            signal.raise_signal(signal.SIGINT)
            return super().__iter__()

    for length in (3, TypeError("no len")):
        transcript = saves_and_ends()
        engine = Engine(counting_step, [transcript, GracefulExit()])
        interrupted(engine, data=Interrupting([1, 1, 1], length), epochs=1)
        assert transcript.lines == ["run_end 0/0"]


def test_a_signal_while_the_end_of_sized_data_is_checked_completes_the_epoch():
    class Interrupting(SizedData):
        def __iter__(self):
            yield from super().__iter__()
            signal.raise_signal(signal.SIGINT)
            yield 1

    transcript = saves_and_ends()
    interrupted(Engine(counting_step, [transcript, GracefulExit()]), data=Interrupting([1, 1, 1], 3), epochs=2)
    assert transcript.lines == ["save 3/1", "run_end 3/1"]


def test_a_signal_during_lists_and_batches_lets_the_next_step_run():
    class Interrupting(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), start=1):
                if number == 3:
                    signal.raise_signal(signal.SIGINT)
                yield batch

    transcript = saves_and_ends()
    engine = Engine(counting_step, [transcript, GracefulExit()], steps_per_call=1)
    interrupted(engine, data=Interrupting([1] * 5), epochs=1)
    assert transcript.lines == ["save 3/0", "run_end 3/0"]


def test_a_signal_during_fast_forward_runs_no_step_and_saves_nothing():
    def data(number):
        yield from [1, 1]
        if transcript.lines:
            signal.raise_signal(signal.SIGINT)
        yield from [1, 1]

    transcript = saves_and_ends()
    engine = Engine(counting_step, [GracefulExit(), transcript])
    part = engine.run(jnp.int32(0), data, steps=3)
    with pytest.raises(KeyboardInterrupt):
        Engine(counting_step, [GracefulExit(), transcript]).run(part, lambda number: data(number), steps=8)
    assert transcript.lines == ["save 3/0", "run_end 3/0", "run_end 3/0"]


def test_restoring_a_run_after_the_signal_does_not_undo_it():
    part = Engine(counting_step).run(jnp.int32(0), [1] * 6, steps=3)
    transcript = saves_and_ends()
    engine = Engine(counting_step, [GracefulExit(), transcript])
    send(engine, "load", signal.SIGINT)
    engine.on("load")(lambda loop: loop.restore(part.snapshot))
    interrupted(engine, data=[1] * 6)
    assert transcript.lines == ["run_end 3/0"]


def test_restoring_a_run_that_was_stopped_finally_keeps_it_stopped():
    part, ends = Engine(counting_step, [StopAt(1, reason="enough")]).run(jnp.int32(0), [1] * 6, steps=3), []
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "load", signal.SIGINT)
    engine.on("load")(lambda loop: loop.restore(part.snapshot))
    engine.on("run_end")(lambda loop: ends.append((loop.stopped, loop.finished)))
    interrupted(engine, data=[1] * 6)
    assert ends == [("enough", True)]


@BOTH
def test_resumed_run_ends_in_the_same_bytes(number, tmp_path):
    key = jax.random.key(7)
    whole = Engine(step).run(fresh_state(), epoch, steps=36, rng=key)
    engine = Engine(step, [GracefulExit(), Checkpoint(tmp_path, when=1000)])
    send(engine, "step_end", number, at=9)
    with pytest.raises(ENDS[number][0]):
        engine.run(fresh_state(), epoch, steps=36, rng=key)
    again = Engine(step, [GracefulExit(), Checkpoint(tmp_path, when=1000)])
    began = []
    again.on("run_begin")(lambda loop: began.append(loop.step))
    assert same_bytes(again.run(fresh_state(), epoch, steps=36, rng=key).state, whole.state)
    assert began == [9]


def test_a_signal_in_the_last_step_is_still_passed_on():
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=12)
    interrupted(engine)


def test_a_signal_in_the_last_save_leaves_the_run_finished():
    history = []
    engine = Engine(counting_step, [GracefulExit()], log_every=5)
    send(engine, "save", signal.SIGINT, at=12)
    engine.on("run_end")(lambda loop: history.extend([loop.stopped, *loop.history.steps("train/loss")]))
    interrupted(engine)
    assert history == [None, 5, 10, 12]


def test_a_final_stop_at_the_same_step_keeps_its_reason():
    reasons = []
    engine = Engine(counting_step, [EarlyStopping("epoch/loss", patience=1), GracefulExit()])
    send(engine, "save", signal.SIGINT, at=8)
    engine.on("run_end")(lambda loop: reasons.append((loop.stopped, loop.finished)))
    interrupted(engine)
    assert reasons == [("epoch/loss has not fallen below 1 in 1 evaluation (mode='min')", True)]


@BOTH
def test_a_previous_handler_is_called_instead_of_an_exit(number):
    heard, transcript = [], saves_and_ends()
    signal.signal(number, lambda *args: heard.append((args, *transcript.lines)))
    before = handlers()
    engine = Engine(counting_step, [GracefulExit(), transcript])
    send(engine, "step_end", number, at=2)
    result = engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert heard == [((number, None), "save 2/0", "run_end 2/0")]
    assert (result.step, result.stopped, handlers()) == (2, number.name, before)


def test_a_signal_with_its_default_action_becomes_an_exit_status():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    with pytest.raises(SystemExit, match=r"^130\n"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)


def test_a_second_signal_stops_at_once():
    transcript, graceful = saves_and_ends(), GracefulExit()
    lines, graceful.clock = transcript.lines, itertools.count().__next__
    engine = Engine(counting_step, [graceful, transcript])
    send(engine, "step_begin", signal.SIGINT, at=2)
    send(engine, "step_begin", signal.SIGINT, at=2)
    engine.on("step_begin")(lambda loop: lines.append(f"step_begin {loop.step}"))
    ours = lambda: any(getattr(handler, "__self__", None) is graceful for handler in handlers())  # noqa: E731
    engine.on("exception")(lambda loop, error: lines.append(f"handlers are ours: {ours()}"))
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert caught.value.__notes__ == ["onstep: raised by sender_2.on_step_begin at step 2"]
    assert lines == ["step_begin 0", "step_begin 1", "handlers are ours: False", "run_end 2/0"]
    assert handlers() == before


def test_a_second_signal_of_another_kind_goes_to_its_previous_handler_at_once():
    heard = []
    signal.signal(signal.SIGTERM, lambda *args: heard.append(len(transcript.lines)))
    transcript, graceful = saves_and_ends(), GracefulExit()
    graceful.clock = itertools.count().__next__
    engine = Engine(counting_step, [graceful, transcript])
    for number in (signal.SIGINT, signal.SIGTERM):
        send(engine, "step_end", number, at=2)
    interrupted(engine)
    assert (heard, transcript.lines) == ([0], ["save 2/0", "run_end 2/0"])


def test_an_echo_of_the_signal_is_not_a_second_signal():
    transcript, graceful = saves_and_ends(), GracefulExit()
    graceful.clock = FakeClock(5.0)
    engine = Engine(counting_step, [graceful, transcript])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        send(engine, "step_end", number, at=2)
    interrupted(engine)
    assert transcript.lines == ["save 2/0", "run_end 2/0"]


def test_a_storm_of_signals_counts_as_one():
    transcript, graceful = saves_and_ends(), GracefulExit()
    graceful.clock = (0.3 * n for n in itertools.count()).__next__  # each signal comes soon after the one before
    engine = Engine(counting_step, [graceful, transcript])
    for _ in range(10):
        send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)
    assert transcript.lines == ["save 2/0", "run_end 2/0"]


def test_the_user_is_told_that_no_step_has_run(capsys, tmp_path):
    engine = Engine(counting_step, [GracefulExit(), Checkpoint(tmp_path)])
    send(engine, "run_begin", signal.SIGINT, at=0)
    interrupted(engine)
    assert "stopped at step 0; nothing is saved, because no step has run\n" in capsys.readouterr().err


def test_the_user_is_told(capsys):
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)
    assert capsys.readouterr().err == (
        "onstep: SIGINT: finishing this step and saving before stopping. Send it again to stop immediately.\n"
        "onstep: stopped at step 2; nothing is saved, because the run has no Checkpoint callback\n"
    )


def test_an_interrupt_that_nobody_catches_prints_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == ""
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "KeyboardInterrupt" in capsys.readouterr().err


def test_a_message_that_cannot_be_written_is_left_out(monkeypatch):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    transcript = saves_and_ends()
    engine = Engine(counting_step, [GracefulExit(), transcript])
    monkeypatch.setattr(sys, "stderr", Busy())
    send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)
    assert transcript.lines == ["save 2/0", "run_end 2/0"]


def test_no_handler_is_installed_before_or_after_a_run():
    before, during = handlers(), []
    engine = Engine(counting_step, [GracefulExit()])
    assert handlers() == before
    engine.on("load")(lambda loop: during.extend(handlers()))
    engine.run(jnp.int32(0), [1], epochs=1)
    assert not set(during) & set(before)
    assert handlers() == before


@PLACES
@pytest.mark.parametrize("event", ["on_load", "on_run_begin", "on_epoch_begin", "on_step_end", "on_save"])
def test_an_error_reaches_the_caller_with_the_handlers_restored(event, place):
    callbacks, before = [RaiseIn(event, OSError("disk gone"))], handlers()
    callbacks.insert(place, GracefulExit())
    with pytest.raises(OSError, match="disk gone"):
        Engine(counting_step, callbacks).run(jnp.int32(0), [1] * 4, epochs=1)
    assert handlers() == before


@pytest.mark.parametrize("event", ["on_step_end", "on_save", "on_run_end"])
def test_an_error_after_the_signal_comes_out_instead_of_it(event):
    def step(state, batch):
        signal.raise_signal(signal.SIGINT)
        return counting_step(state, batch)

    engine, before = Engine(step, [GracefulExit(), RaiseIn(event, OSError("disk gone"))], jit=False), handlers()
    with pytest.raises(OSError, match="disk gone") as raised:
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert "also raised" not in "".join(raised.value.__notes__)
    assert handlers() == before


@PLACES
def test_an_error_in_run_end_comes_out_instead_of_the_signal(place):
    callbacks = [RaiseIn("run_end", OSError("disk gone"))]
    callbacks.insert(place, GracefulExit())
    engine = Engine(counting_step, callbacks)
    send(engine, "step_end", signal.SIGINT, at=2)
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = Engine(counting_step, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    assert engine.run(jnp.int32(0), [1] * 4, epochs=1).step == 4
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_that_was_set_during_the_run_stays():
    def newer(*args): ...

    engine = Engine(counting_step, [GracefulExit()])
    engine.on("step_end")(lambda loop: signal.signal(signal.SIGTERM, newer))
    engine.run(jnp.int32(0), [1], epochs=1)
    assert handlers() == [newer, signal.default_int_handler]


def test_after_the_run_a_newer_handler_that_calls_ours_reaches_the_previous_one():
    engine = Engine(counting_step, [GracefulExit()])

    @engine.on("run_begin")
    def chain(loop):
        ours = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda number, frame: ours(number, frame))

    engine.run(jnp.int32(0), [1], epochs=1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_signals_can_be_handled():
    plain, during = [], []
    other = Engine(counting_step)
    other.on("load")(lambda loop: plain.extend(handlers()))
    other.run(jnp.int32(0), [1], epochs=1)
    engine = Engine(counting_step, [GracefulExit(signals=[signal.SIGUSR1])])
    engine.on("load")(lambda loop: during.extend(handlers()))
    send(engine, "step_end", signal.SIGUSR1, at=2)
    with pytest.raises(SystemExit, match=rf"^{128 + signal.SIGUSR1}\n"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    names = [[getattr(handler, "__qualname__", handler) for handler in found] for found in (during, plain)]
    assert names[0] == names[1]  # SIGTERM and SIGINT are handled as without it


def test_outside_the_main_thread_it_warns_and_the_run_is_unchanged():
    before = handlers()
    engine = Engine(counting_step, [GracefulExit()])
    with pytest.warns(UserWarning, match="handles no signals, because the run is not in the main thread") as caught:
        result = ThreadPoolExecutor(1).submit(engine.run, jnp.int32(0), [1] * 4, epochs=3).result()
    assert (int(result.state), len(caught), handlers()) == (12, 1, before)


def test_a_second_run_of_the_engine_does_not_see_the_signal_of_the_first():
    engine = Engine(counting_step, [GracefulExit()])
    sent = []

    @engine.on("step_end")
    def once(loop):
        if not sent:
            sent.append(signal.raise_signal(signal.SIGINT))

    interrupted(engine)
    assert engine.run(jnp.int32(0), [1] * 4, epochs=1).stopped is None


def test_a_signal_also_reaches_an_outer_run():
    outer, transcript = Engine(counting_step, [GracefulExit()]), saves_and_ends()
    inner = Engine(counting_step, [GracefulExit(), transcript])
    send(inner, "step_end", signal.SIGINT, at=2)
    ran = []
    outer.on("step_end")(lambda loop: ran.append(inner.run(jnp.int32(0), [1] * 4, epochs=1).stopped))
    before = handlers()
    interrupted(outer)
    assert (ran, transcript.lines, handlers()) == (["SIGINT"], ["save 2/0", "run_end 2/0"], before)


def test_a_signal_comes_out_of_a_for_loop():
    transcript, iterations = saves_and_ends(), []
    engine = Engine(counting_step, [GracefulExit(), transcript])

    def train():
        with engine.steps(jnp.int32(0), [1] * 4, epochs=1) as steps:
            for loop in steps:
                iterations.append(loop.step)
                if loop.step == 2:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert (iterations, transcript.lines) == ([1, 2], ["save 2/0", "run_end 2/0"])


@pytest.mark.parametrize(("deadline", "steps"), [(10, 10), (9.5, 10), (3, 3), (20, 20), (1000, 20)])
def test_a_deadline_in_seconds_is_a_resumable_stop(deadline, steps, capsys):
    transcript = saves_and_ends()
    clock = FakeClock(50.0)

    def step(state, batch):
        clock.advance(1)
        return counting_step(state, batch)

    engine = Engine(step, [GracefulExit(deadline=deadline), transcript], clock=clock, jit=False)
    result = engine.run(jnp.int32(0), [1] * 20, epochs=1)
    stopped = None if steps == 20 else "deadline reached"
    assert (result.step, result.stopped) == (steps, stopped)
    assert transcript.lines == [f"save {steps}/{steps // 20}", f"run_end {steps}/{steps // 20}"]
    assert capsys.readouterr().err == (
        f"onstep: deadline reached: stopping at step {steps} (run again to resume)\n" if stopped else ""
    )
    assert Engine(counting_step, jit=False).run(result, [1] * 20, epochs=1).step == 20


@pytest.mark.parametrize(
    "deadline",
    [0, -5.0, datetime.now(UTC), datetime(2020, 1, 1, tzinfo=UTC)],
    ids=["zero", "negative", "now", "long ago"],
)
def test_a_deadline_that_has_passed_runs_no_step_and_draws_no_batch(deadline):
    drawn = []
    result = Engine(counting_step, [GracefulExit(deadline=deadline)]).run(
        jnp.int32(0), (drawn.append(n) or n for n in range(4)), epochs=1
    )
    assert (result.step, result.stopped, drawn) == (0, "deadline reached", [])


def test_a_datetime_as_a_deadline_ends_the_run_when_it_has_passed():
    ticks = itertools.count()
    deadline = datetime.now(UTC) + timedelta(seconds=0.3)
    engine = Engine(
        counting_step, [GracefulExit(deadline=deadline)], clock=lambda: float(next(ticks))
    )  # due at every step
    result = engine.run(jnp.int32(0), itertools.repeat(1), steps=10**9)
    assert result.stopped == "deadline reached"
    assert 0 <= (datetime.now(UTC) - deadline).total_seconds() < 5


def test_a_deadline_and_a_signal_can_be_combined():
    engine = Engine(counting_step, [GracefulExit(deadline=3600)])
    send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"deadline": datetime(2030, 1, 1)}, "with a time zone, got 2030-01-01"),
        ({"deadline": "6:00:00"}, "in seconds or as a datetime, got '6:00:00'"),
        ({"deadline": True}, "in seconds or as a datetime, got True"),
        ({"deadline": float("nan")}, "in seconds or as a datetime, got nan"),
        ({"deadline": float("inf")}, "in seconds or as a datetime, got inf"),
        ({"signals": [signal.SIGKILL]}, "signals that can be caught, such as SIGTERM, got .*SIGKILL"),
        ({"signals": [999]}, "signals that can be caught, such as SIGTERM, got 999"),
    ],
    ids=["naive", "text", "bool", "nan", "inf", "kill", "unknown"],
)
def test_invalid_arguments_raise_at_construction(options, match):
    with pytest.raises(ValueError, match=f"GracefulExit needs .*{match}"):
        GracefulExit(**options)


# In separate processes, with real signals.

CHILD = """
import os, signal, sys, threading, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it

import jax
from models import epoch, evaluation, fresh_state, step
from onstep import Callback, Engine
from onstep.callbacks import Checkpoint, Evaluate, GracefulExit

directory, moment = sys.argv[1:]


def at(this):
    if this == moment:
        print("now", flush=True)
        time.sleep(0.5)  # continues after the signal, which so arrives during this


def slow(state, batch, rng):
    at("compilation")
    return step(state, batch, rng)


def train(number):
    for n, batch in enumerate(epoch(number)):
        if n == 2:
            at("fast-forward")
        if n == 6 and moment == "no more data":
            print("now", flush=True)
            threading.Event().wait()
        yield batch


passes = []


def held_out(number):
    passes.append(number)
    if len(passes) > 1:  # the first traces the step when the run begins
        at("evaluation")
    yield next(epoch(0))


class Slow(Checkpoint):
    def on_save(self, loop):
        super().on_save(loop)
        at("save")


class Steps(Callback):
    def on_step_end(self, loop):
        if moment == "step" and loop.step >= 8:
            print("now" * (loop.step == 8), flush=True)
            time.sleep(0.2)
        if moment == "fork" and loop.step == 2:
            ready, tell = os.pipe()
            child = os.fork()
            if not child:
                os.write(tell, b"x")
                time.sleep(20)
                os._exit(1)
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitpid(child, 0)[1])


checkpoint = Slow(directory, when=5 if moment == "save" else 1000, name="Checkpoint")
engine = Engine(slow, [GracefulExit(), checkpoint, Steps(), Evaluate(evaluation, held_out, when=7)])
engine.run(fresh_state(), train, steps=36, rng=jax.random.key(7))
print("after the run")
"""


def run(directory, moment, *numbers):
    """Run a child that gets the signals at a moment, and return its exit status and its output."""
    command = [sys.executable, "-c", CHILD, str(directory), moment]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            for n, number in enumerate(numbers):
                assert n or child.stdout.readline() == "now\n"
                if n:  # after the first one was handled, and later than an echo
                    next(line for line in child.stderr if "finishing" in line)
                    time.sleep(0.8)
                child.send_signal(number)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    return child.returncode, out, err


def saved(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def resumes(directory):
    """Return whether the run in the directory ends in the same bytes as an uninterrupted run."""
    options = {"steps": 36, "rng": jax.random.key(7)}
    whole = Engine(step).run(fresh_state(), epoch, **options)
    return same_bytes(Engine(step, [Checkpoint(directory)]).run(fresh_state(), epoch, **options).state, whole.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "steps", "number", "status"),
    [
        ("step", [8], signal.SIGTERM, 143),
        ("step", [8], signal.SIGINT, -signal.SIGINT),
        ("compilation", [], signal.SIGTERM, 143),
        ("evaluation", [7], signal.SIGTERM, 143),
        ("save", [5], signal.SIGTERM, 143),
        ("save", [5], signal.SIGINT, -signal.SIGINT),
    ],
)
def test_a_process_ends_after_one_save_and_resumes(moment, steps, number, status, tmp_path):
    code, out, err = run(tmp_path, moment, number)
    assert (code, "after the run" in out) == (status, False)
    assert f"{number.name}: finishing" in err
    assert saved(tmp_path) == steps
    assert resumes(tmp_path)


@pytest.mark.slow
def test_a_process_that_is_skipping_data_ends_where_it_was(tmp_path):
    options = {"steps": 16, "rng": jax.random.key(7)}
    Engine(step, [Checkpoint(tmp_path, when=1000)]).run(fresh_state(), epoch, **options)
    code, _, _ = run(tmp_path, "fast-forward", signal.SIGTERM)
    assert (code, saved(tmp_path)) == (143, [16])
    assert resumes(tmp_path)


@pytest.mark.slow
@BOTH
def test_a_second_signal_during_a_save_leaves_the_previous_checkpoint(number, tmp_path):
    options = {"steps": 3, "rng": jax.random.key(7)}
    Engine(step, [Checkpoint(tmp_path)]).run(fresh_state(), epoch, **options)
    code, _, _ = run(tmp_path, "save", number, number)
    assert (code, 3 in saved(tmp_path)) == (-number, True)
    assert resumes(tmp_path)


@pytest.mark.slow
@BOTH
def test_a_process_that_waits_for_data_saves_and_ends(number, tmp_path):
    code, _, _ = run(tmp_path, "no more data", number)
    assert (code, saved(tmp_path)) == ({signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number], [6])
    assert resumes(tmp_path)


@pytest.mark.slow
def test_a_forked_child_ends_at_its_own_signal(tmp_path):
    code, out, err = run(tmp_path, "fork")
    assert (code, out.split()[0]) == (0, str(int(signal.SIGTERM))), err


def test_it_shows_itself_as_the_call_that_made_it():
    assert repr(GracefulExit()) == "GracefulExit()"
    assert repr(GracefulExit(deadline=3600, signals=[10])) == "GracefulExit(deadline=3600, signals=(10,))"
