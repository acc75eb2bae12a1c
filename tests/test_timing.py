"""Where the time of a run goes: the stopwatch, the table, the rates."""

import contextlib
import io
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine, every
from onstep.callbacks import timing
from onstep.callbacks.timing import Timing
from onstep.stopwatch import CALL, COMPILE, DATA, REST, WAIT, Stopwatch

COMPILED = "/jax/core/compile/backend_compile_duration"


class Clock:
    """A clock that only goes when something takes time; seconds are powers of 2, so sums are exact."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


class Value:
    """A metric that takes half a second to be read and four to be ready."""

    def __init__(self, clock):
        self.clock = clock

    def __array__(self, dtype=None, copy=None):
        self.clock.take(0.5)
        return np.ones((), np.float32)

    def block_until_ready(self):
        self.clock.take(4)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    return clock


def clocked(clock, callbacks, metrics=None, **options):
    """An engine whose compiled call is a function that takes two seconds."""

    def call(bundle, batch, rng, due):
        clock.take(2)
        return bundle, metrics or {}

    engine = Engine(lambda state, batch: (state, {}), callbacks, steps_per_call=1, **options)
    engine._compiled.call, engine._clock = call, clock
    return engine


class Batches:
    """Batches of ten rows that take a second each."""

    def __init__(self, clock, count):
        self.clock, self.count = clock, count

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            self.clock.take(1)
            yield np.zeros((10, 2), np.float32)


class Takes(Callback):
    """Takes so many seconds at each of some events."""

    def __init__(self, clock, *, name=None, when=1, **seconds):
        self.name, self.when = name, when
        for event, each in seconds.items():
            setattr(self, event, lambda loop, *_, each=each: clock.take(each))


def run(engine, data, state=None, **options):
    return engine.run(state or jnp.int32(0), data, **({"epochs": 1} | options))


# The stopwatch.


def test_a_moment_counts_for_the_part_begun_last():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.take(1)
    for part, seconds in (("a", 2), ("b", 4), ("a", 8)):
        watch.switch(part)
        clock.take(seconds)
    assert watch.read() == {REST: 1, "a": 10, "b": 4}


@pytest.mark.parametrize("raises", [False, True])
def test_an_inner_part_is_no_time_of_the_outer_one(raises):
    clock = Clock()
    watch = Stopwatch(clock)

    def work(seconds):
        clock.take(seconds)
        if raises:
            raise OSError("disk gone")

    def outer():
        clock.take(1)
        with contextlib.suppress(OSError):
            watch.timed("inner", work)(2)
        clock.take(4)

    watch.timed("outer", outer)()
    clock.take(8)
    assert watch.read() == {"outer": 5, "inner": 2, REST: 8}


def test_seconds_are_recounted_as_far_as_the_part_had_them():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.take(1)
    watch.switch("step")
    clock.take(8)
    watch.recount("inner", 2)
    clock.take(4)
    watch.recount("outer", 14)  # as of what was compiled within: the two seconds are not counted again
    assert watch.read() == {REST: 1, "step": 6, "inner": 2, "outer": 4}


# A run.


def test_every_part_of_a_run_gets_its_time(clock):
    slow = Takes(clock, name="slow", on_epoch_begin=16, on_step_end=32, on_save=64, when=2)
    when = Takes(clock, name="begin", on_run_begin=128, on_step_begin=256, on_epoch_end=512, on_run_end=1024)
    watch = Timing(table=False)
    engine = clocked(clock, [watch, slow, when], {"loss": Value(clock)}, in_flight=1)
    run(engine, iter(Batches(clock, 3)))
    assert watch.seconds == {
        REST: 0,
        COMPILE: 0,
        DATA: 3 * 1,
        CALL: 3 * 2,
        WAIT: 3 * 0.5 + 2 * 4,
        "callback slow": 16 + 32,
        "saving slow": 64 + 64,  # also at the end of the run
        "callback begin": 128 + 3 * 256 + 512 + 1024,
        "callback Timing": 0,
    }
    assert sum(watch.seconds.values()) == clock.now


def test_a_callback_within_another_is_timed_by_itself(clock):
    class Logs(Callback):
        def on_step_end(self, loop):
            clock.take(1)
            loop.log({"val/loss": 1.0})
            np.asarray(loop.metrics["loss"])

    watch = Timing(table=False)
    run(clocked(clock, [watch, Logs(), Takes(clock, name="sink", on_log=4)], {"loss": Value(clock)}), [1, 1])
    assert watch.seconds["callback Logs"] == 2 * (1 + 0.5)
    assert (
        watch.seconds["callback sink"] == (2 + 1 + 1 + 1) * 4
    )  # also the epoch's mean, the last window, and the rates


def test_compiling_is_taken_from_where_it_happened(clock):
    class Compiles(Callback):
        def on_step_end(self, loop):
            clock.take(8)
            jax.monitoring.record_event_duration_secs("/jax/compilation_cache/cache_retrieval_time_sec", 1.0)
            elsewhere = threading.Thread(target=jax.monitoring.record_event_duration_secs, args=(COMPILED, 4.0))
            elsewhere.start()
            elsewhere.join()
            jax.monitoring.record_event_duration_secs(COMPILED, 2.0)

    watch = Timing(table=False)
    run(clocked(clock, [watch, Compiles()]), [1, 1])
    assert (watch.seconds["callback Compiles"], watch.seconds[COMPILE]) == (2 * 6, 2 * 2)


def test_a_first_compilation_is_timed_whole():
    watch = Timing(table=False)
    run(Engine(lambda state, batch: (state + batch, {}), [watch]), [1, 1])
    assert watch.seconds[COMPILE] > watch.seconds[CALL] > 0


def test_it_sees_those_before_it_but_for_their_first_and_last_event(clock):
    events = {"on_load": 1, "on_run_begin": 2, "on_step_end": 4, "on_run_end": 8}
    watch = Timing(table=False)
    run(clocked(clock, [Takes(clock, name="a", **events), watch, Takes(clock, name="b", **events)]), [1])
    assert (watch.seconds["callback a"], watch.seconds["callback b"]) == (2 + 4, 1 + 2 + 4 + 8)


def test_the_body_of_ones_own_for_is_time_of_the_loop(clock):
    watch = Timing(table=False)
    engine = clocked(clock, [watch])
    with engine.steps(jnp.int32(0), [1] * 6, epochs=1, when=every(seconds=4)) as steps:
        for _ in steps:
            clock.take(1)
    assert watch.seconds == {REST: 3 * 1, CALL: 6 * 2, DATA: 0, WAIT: 0, COMPILE: 0, "callback Timing": 0}


@pytest.mark.parametrize("options", [{"steps_per_call": 4}, {"steps_per_call": "auto"}, {"jit": False}], ids=str)
def test_it_works_however_steps_are_called(clock, options):
    watch = Timing(file=(file := io.StringIO()))
    engine = Engine(lambda state, batch: (state + 1, {"loss": batch.sum()}), [watch], log_every=5, **options)
    result = run(engine, Batches(clock, 10))
    assert watch.seconds[DATA] == clock.now == 10
    assert result.history["time/examples_per_second"] == [10, 10]
    assert file.getvalue().endswith("10 steps in 10.00 s: 1 steps/s, 10 examples/s\n")


@pytest.mark.parametrize("event", ["on_load", "on_run_begin", "on_step_end", "on_save", "on_run_end"])
@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
def test_everything_is_put_back_however_a_run_ends(clock, event, fails):
    def answer(loop):
        loops.append(loop)
        if fails:
            raise OSError("disk gone")

    loops, watch, last = [], Timing(table=False), Callback()
    setattr(last, event, answer)
    engine = clocked(clock, [watch, last])
    call = engine._compiled.call
    with pytest.raises(OSError, match="disk gone") if fails else contextlib.nullcontext():
        run(engine, [1])
    loop = loops[0]
    assert loop._program.call is call
    assert loop._events.answers[event][-1].method is answer
    assert "prepare" not in vars(loop._program)
    assert "read" not in vars(loop._meter)
    assert not {"take", "blocks", "peek", "ended", "begin_epoch"} & vars(loop._feed).keys()
    clock.take(1)
    jax.monitoring.record_event_duration_secs(COMPILED, 1.0)
    assert watch._watch.seconds[COMPILE] == 0


def test_two_of_them_see_the_same(clock):
    one, two = Timing(table=False), Timing(table=False)
    engine = clocked(clock, [one, Takes(clock, on_step_end=8), two])
    call = engine._compiled.call
    run(engine, Batches(clock, 3))
    assert one.seconds == two.seconds | {"callback Timing_2": 0}
    assert engine._compiled.call is call


def test_a_second_run_is_timed_afresh(clock):
    watch = Timing(table=False)
    engine = clocked(clock, [watch])
    run(engine, [1] * 3)
    run(engine, [1] * 5)
    assert watch.seconds[CALL] == 5 * 2


# The table.


def test_the_table_has_the_largest_part_first(clock):
    file = io.StringIO()
    events = Takes(clock, name="slow", on_step_end=512), Takes(clock, name="a", on_run_begin=1), Takes(clock, on_save=1)
    run(clocked(clock, [Timing(file=file), *events]), Batches(clock, 2))
    assert file.getvalue().splitlines() == [
        "callback slow          1024.00 s   99.1%",
        "calling the step          4.00 s    0.4%",
        "data                      2.00 s    0.2%",
        "saving Takes              2.00 s    0.2%",
        "other callbacks           1.00 s    0.1%",
        "the loop                  0.00 s    0.0%",
        "compiling                 0.00 s    0.0%",
        "waiting for the step      0.00 s    0.0%",
        "2 steps in 1033.00 s: 0.00194 steps/s, 0.0194 examples/s",
    ]


def test_batches_without_rows_have_no_examples(clock):
    file = io.StringIO()
    result = run(clocked(clock, [Timing(file=file)], {"loss": 1.0}, log_every=1000), [1] * 1000)
    assert file.getvalue().endswith("\n1,000 steps in 2000.00 s: 0.5 steps/s\n")
    assert "time/examples_per_second" not in result.history


@pytest.mark.parametrize(("rate", "said"), [(12345.6, "12,346"), (99.94, "99.9"), (0.012345, "0.0123")], ids=str)
def test_a_rate_has_as_many_digits_as_one_reads(rate, said):
    assert timing._short(rate) == said


def test_a_run_that_fails_has_its_table_and_its_own_error(clock):
    error, file = OSError("disk gone"), io.StringIO()
    engine = clocked(clock, [Timing(file=file)])

    @engine.on("step_end", when=2)
    def fail(loop):
        raise error

    with pytest.raises(OSError, match="disk gone") as caught:
        run(engine, [1] * 3)
    assert caught.value is error
    assert error.__notes__ == ["onstep: raised by fail.on_step_end at step 2"]
    assert file.getvalue().endswith("\n2 steps in 4.00 s: 0.5 steps/s\n")


def test_the_table_goes_to_stderr(capsys):
    run(Engine(lambda state, batch: (state, {}), [Timing()]), [1])
    captured = capsys.readouterr()
    assert "calling the step" in captured.err
    assert captured.out == ""


def test_a_run_without_a_step_prints_nothing(capsys):
    first = run(Engine(lambda state, batch: (state, {})), [1])
    Engine(lambda state, batch: (state, {}), [Timing()]).run(first, [1], epochs=1)
    assert capsys.readouterr().err == "onstep: already at step 1, epoch 1 of 1: nothing to do\n"


def test_the_table_can_be_left_out(clock, capsys):
    run(clocked(clock, [Timing(table=False)]), [1])
    assert capsys.readouterr().err == ""


# The rates.


def test_rates_and_shares_are_recorded_with_the_training_metrics(clock):
    callbacks = [Timing(table=False), Takes(clock, on_step_end=1), Takes(clock, on_save=4, when=2)]
    result = run(clocked(clock, callbacks, {"loss": 1.0}, log_every=2), Batches(clock, 4))
    names = ("steps_per_second", "examples_per_second", "data", "callbacks")
    recorded = {name: result.history[f"time/{name}"] for name in names}
    seconds = 2 + 2 * 2 + 2, 4 + 2 + 2 * 2 + 2  # a save comes after the numbers of its step
    assert recorded == {
        "steps_per_second": [2 / s for s in seconds],
        "examples_per_second": [2 / s * 10 for s in seconds],
        "data": [2 / seconds[0], 2 / seconds[1]],
        "callbacks": [2 / seconds[0], (4 + 2) / seconds[1]],
    }
    assert result.history.steps("time/data") == [2, 4]


def test_compiling_slows_no_recorded_rate(clock):
    engine = clocked(clock, [Timing(table=False)], {"loss": 1.0}, log_every=1)

    @engine.on("step_end")
    def compiles(loop):
        clock.take(8)
        jax.monitoring.record_event_duration_secs(COMPILED, 8.0)

    assert run(engine, [1, 1]).history["time/steps_per_second"] == [0.5, 0.5]


def test_a_run_that_goes_on_counts_from_there(clock):
    file = io.StringIO()
    first = run(clocked(clock, []), [1] * 100)
    engine = clocked(clock, [Timing(file=file)], {"loss": 1.0}, log_every=5)
    result = engine.run(first, [1] * 100, steps=105)
    assert result.history["time/steps_per_second"] == [0.5]
    assert file.getvalue().endswith("\n5 steps in 10.00 s: 0.5 steps/s\n")


def test_a_step_has_one_record_whoever_logs_training_metrics(clock):
    first = run(clocked(clock, []), [1] * 4)
    before, after = Callback(), Callback()
    before.on_run_begin = lambda loop: loop.log({"train/size": 1})
    after.on_step_end = lambda loop: loop.log({"train/lr": 1}) if loop.step == 6 else None
    engine = clocked(clock, [before, Timing(table=False), after], {"loss": 1.0}, log_every=2)
    assert run(engine, [1] * 4, first, epochs=2).history.steps("time/steps_per_second") == [6, 8]


# Use of the device.


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_mfu_is_what_the_products_of_a_step_use_of_the_device(clock, monkeypatch, steps_per_call):
    monkeypatch.setitem(timing.PEAK, jax.devices()[0].device_kind, 1000.0)
    engine = Engine(
        lambda state, batch: (state, {"loss": jnp.sum(batch @ state)}),
        [Timing(table=False)],
        log_every=4,
        steps_per_call=steps_per_call,
    )
    data = [np.zeros((5, 2), np.float32)] * 4
    engine.on("step_end", when=4)(lambda loop: clock.take(16))
    result = engine.run(jnp.zeros((2, 3)), data, epochs=1)
    assert result.history["time/mfu"] == [pytest.approx(2 * 5 * 2 * 3 / 1000 * 4 / 16)]


@pytest.mark.parametrize(("peak", "jit"), [(0, True), (1000.0, False)], ids=["unknown", "not compiled"])
def test_there_is_no_mfu_where_it_means_nothing(clock, monkeypatch, peak, jit):
    monkeypatch.setitem(timing.PEAK, jax.devices()[0].device_kind, peak)
    engine = Engine(lambda s, b: (s, {"loss": jnp.sum(b @ s)}), [Timing(table=False)], log_every=1, jit=jit)
    result = engine.run(jnp.zeros((2, 3)), Batches(clock, 2), epochs=1)
    assert "time/steps_per_second" in result.history
    assert "time/mfu" not in result.history


IMAGES, KERNEL = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))


def convolve(images, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (lambda x, y: x @ y, (jnp.zeros((4, 5)), jnp.zeros((5, 6))), 2 * 4 * 5 * 6),
        (lambda x, y: x @ y, (jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))), 2 * 3 * 4 * 5 * 6),
        (
            lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0],
            (jnp.zeros((2, 4)), jnp.zeros((7, 4, 4))),
            7 * 64,
        ),
        (convolve, (IMAGES, KERNEL), 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)),
        (lambda x, k: convolve(x, k, 2), (IMAGES, KERNEL), 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)),
        (jax.grad(lambda x, k: convolve(x, k, 2).sum()), (IMAGES, KERNEL), 2 * 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)),
        (jax.grad(lambda k, x: convolve(x, k, 2).sum()), (KERNEL, IMAGES), 2 * 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)),
        (jnp.add, (jnp.zeros(3), jnp.zeros(3)), 0),
    ],
    ids=["product", "batch of products", "scan", "convolution", "strided", "gradient", "gradient of a kernel", "none"],
)
def test_flops_are_those_of_products_and_convolutions(function, arguments, flops):
    assert timing.flops(jax.jit(function).trace(*arguments).jaxpr) == flops
