"""Signals and deadlines: what still runs, what is saved, what comes out, and what is given back."""

import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from models import epoch, fresh_state, same_bytes, step
from onstep import Callback, Engine
from onstep.callbacks import Checkpoint, EarlyStopping, Evaluate, GracefulExit

ENDS = {signal.SIGTERM: (SystemExit, r"^143\n"), signal.SIGINT: (KeyboardInterrupt, r"^\n")}  # and then a note
BOTH = pytest.mark.parametrize("number", list(ENDS), ids=lambda number: number.name)
PLACES = pytest.mark.parametrize("place", [0, 1], ids=["listed first", "listed last"])


@pytest.fixture(autouse=True)
def plain_handlers():
    """Each test begins with the handlers of a fresh process, and leaves those that it found."""
    before = {number: signal.getsignal(number) for number in ENDS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in ENDS]


def add(state, batch):
    return state + batch, {"loss": batch}


class Lines(Callback):
    """What was saved and what ended, at which step."""

    when = 100  # a save comes at the end alone

    def __init__(self):
        self.lines = []

    def on_save(self, loop):
        self.lines.append(("save", loop.step))

    def on_run_end(self, loop):
        self.lines.append(("end", loop.step))


def send(engine, event, number, at=0):
    """The signal comes in this event at this step."""

    @engine.on(event)
    def sender(loop, *record):
        if loop.step == at:
            signal.raise_signal(number)


def interrupted(engine, number=signal.SIGINT, data=(1, 1, 1, 1), **to):
    """Runs until the signal comes out."""
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
def test_a_signal_in_any_event_ends_the_run_there_and_then_comes_out(event, at, saved, place, number):
    lines, before = Lines(), handlers()
    callbacks = [lines]
    callbacks.insert(place, GracefulExit())
    engine = Engine(add, callbacks, log_every=3)
    send(engine, event, number, at)
    interrupted(engine, number)
    assert lines.lines == [("save", n) for n in saved] + [("end", at)]
    assert handlers() == before


@BOTH
def test_a_signal_in_the_compiled_call_lets_the_step_end(number):
    lines = Lines()
    engine = Engine(add, [lines, GracefulExit()], steps_per_call=1)

    def call(bundle, batch, key, due):
        state, carries, count = bundle
        if state == 2:
            signal.raise_signal(number)
        return (state + batch, carries, count), {}

    engine._compiled.call = call
    interrupted(engine, number)
    assert lines.lines == [("save", 3), ("end", 3)]


def test_a_signal_during_compilation_ends_the_run_before_its_first_step():
    lines = Lines()

    def traced(state, batch):
        signal.raise_signal(signal.SIGINT)
        return add(state, batch)

    interrupted(Engine(traced, [lines, GracefulExit()]))
    assert lines.lines == [("end", 0)]


def test_a_signal_during_an_evaluation_lets_it_end():
    lines = Lines()

    def data():
        yield 1
        signal.raise_signal(signal.SIGINT)
        yield 3

    evaluate = Evaluate(lambda state, batch: {"batch": batch * 1.0}, lambda number: data(), when=2)
    engine = Engine(add, [lines, evaluate, GracefulExit()])
    means = []
    engine.on("save")(lambda loop: means.append(loop.latest.get("val/batch")))
    interrupted(engine)
    assert (lines.lines, means) == ([("save", 2), ("end", 2)], [None, 2.0])


@pytest.mark.parametrize(("steps_per_call", "drawn"), [(1, 3), (8, 4)])
def test_a_signal_while_a_batch_is_drawn_lets_its_step_run(steps_per_call, drawn):
    lines = Lines()

    def data(number):
        yield from [1, 1]
        signal.raise_signal(signal.SIGINT)
        yield from [1, 1]

    interrupted(Engine(add, [lines, GracefulExit()], steps_per_call=steps_per_call), data=data)
    assert lines.lines in [[("save", n), ("end", n)] for n in range(2, drawn + 1)]  # what was drawn is used


def test_a_signal_during_fast_forward_runs_no_step_and_saves_nothing():
    def data(number):
        yield from [1, 1]
        if lines.lines:
            signal.raise_signal(signal.SIGINT)
        yield from [1, 1]

    lines = Lines()
    engine = Engine(add, [GracefulExit(), lines])
    part = engine.run(jnp.int32(0), data, steps=3)
    with pytest.raises(KeyboardInterrupt):
        Engine(add, [GracefulExit(), lines]).run(part, lambda number: data(number), steps=8)
    assert lines.lines == [("save", 3), ("end", 3), ("end", 3)]


def test_a_run_that_is_restored_after_the_signal_does_not_undo_it():
    part = Engine(add).run(jnp.int32(0), [1] * 6, steps=3)
    lines = Lines()
    engine = Engine(add, [GracefulExit(), lines])
    send(engine, "load", signal.SIGINT)
    engine.on("load")(lambda loop: loop.restore(part.snapshot))
    interrupted(engine, data=[1] * 6)
    assert lines.lines == [("end", 3)]


def test_a_run_that_is_restored_after_the_signal_and_was_stopped_for_good_stays_so():
    first = Engine(add)
    first.on("step_end")(lambda loop: loop.stop("enough"))
    part, ends = first.run(jnp.int32(0), [1] * 6, steps=3), []
    engine = Engine(add, [GracefulExit()])
    send(engine, "load", signal.SIGINT)
    engine.on("load")(lambda loop: loop.restore(part.snapshot))
    engine.on("run_end")(lambda loop: ends.append((loop.stopped, loop.finished)))
    interrupted(engine, data=[1] * 6)
    assert ends == [("enough", True)]


@BOTH
def test_what_was_interrupted_goes_on_to_the_same_bytes(number, tmp_path):
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


def test_a_signal_in_the_last_step_still_comes_out():
    engine = Engine(add, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=12)
    interrupted(engine)


def test_a_signal_in_the_last_save_leaves_the_run_finished():
    history = []
    engine = Engine(add, [GracefulExit()], log_every=5)
    send(engine, "save", signal.SIGINT, at=12)
    engine.on("run_end")(lambda loop: history.extend([loop.stopped, *loop.history.steps("train/loss")]))
    interrupted(engine)
    assert history == [None, 5, 10, 12]


def test_a_final_stop_at_the_same_step_keeps_its_reason():
    reasons = []
    engine = Engine(add, [EarlyStopping("epoch/loss", patience=1), GracefulExit()])
    send(engine, "save", signal.SIGINT, at=8)
    engine.on("run_end")(lambda loop: reasons.append((loop.stopped, loop.finished)))
    interrupted(engine)
    assert reasons == [("epoch/loss has not improved on 1 in 1 evaluations", True)]


@BOTH
def test_a_handler_that_was_there_is_called_in_the_place_of_an_exit(number):
    heard, lines = [], Lines()
    signal.signal(number, lambda *args: heard.append((args, *lines.lines)))
    before = handlers()
    engine = Engine(add, [GracefulExit(), lines])
    send(engine, "step_end", number, at=2)
    result = engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert heard == [((number, None), ("save", 2), ("end", 2))]
    assert (result.step, result.stopped, handlers()) == (2, number.name, before)


def test_a_signal_that_has_its_default_action_back_comes_out_as_an_exit_status():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    engine = Engine(add, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    with pytest.raises(SystemExit, match=r"^130\n"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)


def test_a_second_signal_ends_at_once():
    lines, now = Lines(), itertools.count()
    graceful = GracefulExit()
    graceful._clock = lambda: next(now)
    engine = Engine(add, [graceful, lines])
    send(engine, "step_begin", signal.SIGINT, at=2)
    send(engine, "step_begin", signal.SIGINT, at=2)
    engine.on("step_begin")(lambda loop: lines.lines.append(("begin", loop.step)))
    engine.on("exception")(lambda loop, error: lines.lines.append(handlers()))
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert caught.value.__notes__ == ["onstep: raised by sender_2.on_step_begin at step 2"]
    assert lines.lines == [("begin", 0), ("begin", 1), before, ("end", 2)]
    assert handlers() == before


def test_a_second_signal_of_another_kind_goes_to_its_old_handler_there():
    heard, now = [], itertools.count()
    signal.signal(signal.SIGTERM, lambda *args: heard.append(len(lines.lines)))
    lines, graceful = Lines(), GracefulExit()
    graceful._clock = lambda: next(now)
    engine = Engine(add, [graceful, lines])
    for number in (signal.SIGINT, signal.SIGTERM):
        send(engine, "step_end", number, at=2)
    interrupted(engine)
    assert (heard, lines.lines) == ([0], [("save", 2), ("end", 2)])


def test_an_echo_of_the_signal_is_no_second_one():
    lines, graceful = Lines(), GracefulExit()
    graceful._clock = lambda: 5.0
    engine = Engine(add, [graceful, lines])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        send(engine, "step_end", number, at=2)
    interrupted(engine)
    assert lines.lines == [("save", 2), ("end", 2)]


def test_the_person_is_told(capsys):
    engine = Engine(add, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)
    assert capsys.readouterr().err == (
        "onstep: SIGINT: finishing what is due at this step, saving, then ending; again to end at once\n"
    )


def test_a_message_that_cannot_be_written_breaks_nothing(monkeypatch):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    lines = Lines()
    engine = Engine(add, [GracefulExit(), lines])
    monkeypatch.setattr(sys, "stderr", Busy())
    send(engine, "step_end", signal.SIGINT, at=2)
    interrupted(engine)
    assert lines.lines == [("save", 2), ("end", 2)]


def test_nothing_is_installed_before_a_run_or_left_after_it():
    before, during = handlers(), []
    engine = Engine(add, [GracefulExit()])
    assert handlers() == before
    engine.on("load")(lambda loop: during.extend(handlers()))
    engine.run(jnp.int32(0), [1], epochs=1)
    assert not set(during) & set(before)
    assert handlers() == before


class Fails(Callback):
    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, loop):
        raise OSError("disk gone")


@PLACES
@pytest.mark.parametrize("event", ["on_load", "on_run_begin", "on_epoch_begin", "on_step_end", "on_save"])
def test_an_error_goes_to_the_caller_with_the_handlers_given_back(event, place):
    callbacks, before = [Fails(event)], handlers()
    callbacks.insert(place, GracefulExit())
    with pytest.raises(OSError, match="disk gone"):
        Engine(add, callbacks).run(jnp.int32(0), [1] * 4, epochs=1)
    assert handlers() == before


@pytest.mark.parametrize("event", ["on_step_end", "on_save", "on_run_end"])
def test_an_error_after_the_signal_comes_out_in_its_place(event):
    engine, before = Engine(add, [GracefulExit(), Fails(event)]), handlers()
    engine._compiled.call = lambda bundle, *rest: (signal.raise_signal(signal.SIGINT) or bundle, {})
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert handlers() == before


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = Engine(add, [GracefulExit()])
    send(engine, "step_end", signal.SIGINT, at=2)
    assert engine.run(jnp.int32(0), [1] * 4, epochs=1).step == 4
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_that_was_set_during_the_run_stays():
    def newer(*args): ...

    engine = Engine(add, [GracefulExit()])
    engine.on("step_end")(lambda loop: signal.signal(signal.SIGTERM, newer))
    engine.run(jnp.int32(0), [1], epochs=1)
    assert handlers() == [newer, signal.default_int_handler]


def test_after_the_run_a_newer_handler_that_calls_ours_reaches_the_old_one():
    engine = Engine(add, [GracefulExit()])

    @engine.on("run_begin")
    def chain(loop):
        ours = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda number, frame: ours(number, frame))

    engine.run(jnp.int32(0), [1], epochs=1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_signals_are_answered_if_asked():
    engine = Engine(add, [GracefulExit(signals=[signal.SIGUSR1])])
    during = []
    engine.on("load")(lambda loop: during.extend(handlers()))
    send(engine, "step_end", signal.SIGUSR1, at=2)
    with pytest.raises(SystemExit, match=rf"^{128 + signal.SIGUSR1}\n"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
    assert during == handlers()


def test_outside_the_main_thread_it_warns_and_the_run_is_the_same():
    before = handlers()
    engine = Engine(add, [GracefulExit()])
    with pytest.warns(UserWarning, match="answers no signals: the run is not in the main thread") as caught:
        result = ThreadPoolExecutor(1).submit(engine.run, jnp.int32(0), [1] * 4, epochs=3).result()
    assert (int(result.state), len(caught), handlers()) == (12, 1, before)


def test_a_second_run_of_the_engine_knows_nothing_of_the_first_ones_signal():
    engine = Engine(add, [GracefulExit()])
    sent = []

    @engine.on("step_end")
    def once(loop):
        if not sent:
            sent.append(signal.raise_signal(signal.SIGINT))

    interrupted(engine)
    assert engine.run(jnp.int32(0), [1] * 4, epochs=1).stopped is None


def test_a_signal_reaches_the_run_around_a_run_as_well():
    outer, lines = Engine(add, [GracefulExit()]), Lines()
    inner = Engine(add, [GracefulExit(), lines])
    send(inner, "step_end", signal.SIGINT, at=2)
    ran = []
    outer.on("step_end")(lambda loop: ran.append(inner.run(jnp.int32(0), [1] * 4, epochs=1).stopped))
    before = handlers()
    interrupted(outer)
    assert (ran, lines.lines, handlers()) == (["SIGINT"], [("save", 2), ("end", 2)], before)


def test_a_signal_comes_out_of_a_for_of_ones_own():
    lines, turns = Lines(), []
    engine = Engine(add, [GracefulExit(), lines])

    def train():
        with engine.steps(jnp.int32(0), [1] * 4, epochs=1) as steps:
            for loop in steps:
                turns.append(loop.step)
                if loop.step == 2:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert (turns, lines.lines) == ([1, 2], [("save", 2), ("end", 2)])


@pytest.mark.parametrize(("deadline", "steps"), [(10, 10), (9.5, 10), (3, 3), (20, 20), (1000, 20)])
def test_a_deadline_in_seconds_is_a_stop_that_can_be_resumed(deadline, steps, capsys):
    lines = Lines()
    engine = Engine(add, [GracefulExit(deadline=deadline), lines], steps_per_call=1)
    now = [50.0]
    engine._clock = lambda: now[0]

    def call(bundle, batch, key, due):
        now[0] += 1.0
        return (bundle[0] + batch, *bundle[1:]), {}

    engine._compiled.call = call
    result = engine.run(jnp.int32(0), [1] * 20, epochs=1)
    stopped = None if steps == 20 else "deadline reached"
    assert (result.step, result.stopped) == (steps, stopped)
    assert lines.lines == [("save", steps), ("end", steps)]
    assert capsys.readouterr().err == (
        "onstep: deadline reached: the run ends here, to be resumed\n" if stopped else ""
    )
    assert Engine(add, steps_per_call=1).run(result, [1] * 20, epochs=1).step == 20


@pytest.mark.parametrize(
    "deadline",
    [0, -5.0, datetime.now(UTC), datetime(2020, 1, 1, tzinfo=UTC)],
    ids=["zero", "negative", "now", "long ago"],
)
def test_a_deadline_that_has_passed_runs_no_step_and_draws_no_batch(deadline):
    drawn = []
    result = Engine(add, [GracefulExit(deadline=deadline)]).run(
        jnp.int32(0), (drawn.append(n) or n for n in range(4)), epochs=1
    )
    assert (result.step, result.stopped, drawn) == (0, "deadline reached", [])


def test_a_moment_with_a_time_zone_ends_the_run_once_it_has_come():
    ticks = itertools.count()
    deadline = datetime.now(UTC) + timedelta(seconds=0.3)
    engine = Engine(add, [GracefulExit(deadline=deadline)])
    engine._clock = lambda: float(next(ticks))  # it is looked at after each step
    result = engine.run(jnp.int32(0), itertools.repeat(1), steps=10**9)
    assert result.stopped == "deadline reached"
    assert 0 <= (datetime.now(UTC) - deadline).total_seconds() < 5


def test_a_deadline_and_a_signal_go_together():
    engine = Engine(add, [GracefulExit(deadline=3600)])
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
def test_what_it_cannot_do_is_refused_when_it_is_made(options, match):
    with pytest.raises(ValueError, match=f"GracefulExit needs .*{match}"):
        GracefulExit(**options)


# In processes of their own, with real signals.

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
        time.sleep(0.5)  # goes on after the signal, which so comes amid this


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


def held_out(number):
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
    """Runs a child, which gets the signals at that moment: its exit status, and what it said."""
    command = [sys.executable, "-c", CHILD, str(directory), moment]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            for n, number in enumerate(numbers):
                assert n or child.stdout.readline() == "now\n"
                time.sleep(0.2 * n)
                child.send_signal(number)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    return child.returncode, out, err


def saved(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def goes_on(directory):
    """Whether the run in the directory ends in the bytes of one that was never disturbed."""
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
def test_a_process_ends_after_one_save_and_goes_on(moment, steps, number, status, tmp_path):
    code, out, err = run(tmp_path, moment, number)
    assert (code, "after the run" in out) == (status, False)
    assert f"{number.name}: finishing" in err
    assert saved(tmp_path) == steps
    assert goes_on(tmp_path)


@pytest.mark.slow
def test_a_process_that_skips_data_ends_where_it_was(tmp_path):
    options = {"steps": 16, "rng": jax.random.key(7)}
    Engine(step, [Checkpoint(tmp_path, when=1000)]).run(fresh_state(), epoch, **options)
    code, _, _ = run(tmp_path, "fast-forward", signal.SIGTERM)
    assert (code, saved(tmp_path)) == (143, [16])
    assert goes_on(tmp_path)


@pytest.mark.slow
@BOTH
def test_a_second_signal_during_a_save_leaves_the_checkpoint_before_it(number, tmp_path):
    options = {"steps": 3, "rng": jax.random.key(7)}
    Engine(step, [Checkpoint(tmp_path)]).run(fresh_state(), epoch, **options)
    code, _, _ = run(tmp_path, "save", number, number)
    assert (code, 3 in saved(tmp_path)) == (-number, True)
    assert goes_on(tmp_path)


@pytest.mark.slow
@BOTH
def test_a_process_whose_data_never_comes_ends_at_the_second_signal(number, tmp_path):
    began = time.monotonic()
    code, _, _ = run(tmp_path, "no more data", number, number)
    assert code == -number
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_a_forked_child_ends_at_its_own_signal(tmp_path):
    code, out, err = run(tmp_path, "fork")
    assert (code, out.split()[0]) == (0, str(int(signal.SIGTERM))), err


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
def test_a_failing_end_comes_out_wherever_graceful_exit_stands(place):
    class Fails(Callback):
        def on_run_end(self, loop):
            raise OSError("disk gone")

    callbacks = [Fails()]
    callbacks.insert(place, GracefulExit())
    engine = Engine(add, callbacks)
    send(engine, "step_end", signal.SIGINT, at=2)
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=1)
