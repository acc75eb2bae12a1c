"""Where the time of a run goes: the stopwatch, the table, the rates."""

import contextlib
import inspect
import io
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine, every
from onstep.callbacks import timing
from onstep.callbacks.timing import CALL, COMPILE, DATA, REST, WAIT, Stopwatch, Timing
from onstep.testing import FakeClock, RaiseIn, TickingBatches
from onstep.tools import Observer, Span, count_flops

COMPILED = "/jax/core/compile/backend_compile_duration"
ROWS = np.zeros((10, 2), np.float32)
"""A batch of ten examples."""


@jax.tree_util.register_pytree_node_class
class SlowMetric:
    """A metric that takes four seconds to be ready, and half a second to be merged with others."""

    def __init__(self, clock):
        self.clock = clock

    def block_until_ready(self):
        self.clock.advance(4)

    def merge(self, other):
        self.clock.advance(0.5)
        return self

    def compute(self):
        return 1.0

    def tree_flatten(self):
        return (), self.clock

    @classmethod
    def tree_unflatten(cls, clock, leaves):
        return cls(clock)


class TakeTime(Callback):
    """Takes some seconds at each of some events: seconds are powers of 2, so sums are exact."""

    def __init__(self, clock, *, name=None, when=1, **seconds):
        self.name, self.when = name, when
        for event, each in seconds.items():
            setattr(self, event, lambda loop, *_, each=each: clock.advance(each))


@pytest.fixture
def clock(monkeypatch):
    """A clock for Timing that only a test moves. It also tells Timing what jax compiles, through `listeners`."""
    clock = FakeClock()
    clock.listeners = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", clock.listeners.append)
    monkeypatch.setattr(jax.monitoring, "unregister_event_duration_listener", clock.listeners.remove)
    return clock


def slow_engine(clock, callbacks, metrics=None, **options):
    """An engine whose step is a function that takes two seconds."""

    def step(state, batch):
        clock.advance(2)
        return state, metrics or {}

    return Engine(step, callbacks, jit=False, clock=clock, **options)


def run(engine, data, state=None, **options):
    return engine.run(state or jnp.int32(0), data, **({"epochs": 1} | options))


def batches(clock, count):
    """Batches of ten examples that take a second each."""
    return TickingBatches(clock, [ROWS] * count)


# The stopwatch.


def callback_span(name):
    return Span("callback", name, "on_step_end")


def test_time_counts_for_the_innermost_span():
    clock = FakeClock()
    watch = Stopwatch(clock)
    clock.advance(1)
    watch.begin(callback_span("outer"))
    clock.advance(2)
    watch.begin(Span("wait"))
    clock.advance(4)
    watch.end(Span("wait"))
    clock.advance(8)
    watch.end(callback_span("outer"))
    clock.advance(16)
    assert watch.read() == {REST: 1 + 16, "callback outer": 2 + 8, WAIT: 4}


def test_seconds_are_reattributed_as_far_as_the_part_had_them():
    clock = FakeClock()
    watch = Stopwatch(clock)
    clock.advance(1)
    watch.begin(Span("call"))
    clock.advance(8)
    watch.reattribute("inner", 2)
    clock.advance(4)
    watch.reattribute("outer", 14)  # such as a compilation around the inner one, whose two seconds are not moved again
    assert watch.read() == {REST: 1, CALL: 6, "inner": 2, "outer": 4}


# A run.


def test_every_part_of_a_run_gets_its_time(clock):
    slow = TakeTime(clock, name="slow", on_epoch_begin=16, on_step_end=32, on_save=64, when=2)
    begin = TakeTime(clock, name="begin", on_run_begin=128, on_step_begin=256, on_epoch_end=512, on_run_end=1024)
    watch = Timing(table=False)
    engine = slow_engine(clock, [watch, slow, begin], {"loss": SlowMetric(clock)}, in_flight=1)
    run(engine, iter(batches(clock, 3)))
    assert watch.seconds == {
        REST: 0,
        COMPILE: 0,
        DATA: 3 * 1,
        CALL: 3 * 2,
        WAIT: 2 * 2 * 0.5 + 2 * 4,  # two windows merge three steps each
        "callback slow": 16 + 32,
        "saving slow": 64 + 64,  # also at the end of the run
        "callback begin": 128 + 3 * 256 + 512 + 1024,
        "callback Timing": 0,
    }
    assert sum(watch.seconds.values()) == clock.now


def test_nested_callbacks_are_timed_separately(clock):
    class Logs(Callback):
        def on_step_end(self, loop):
            clock.advance(1)
            loop.log({"val/loss": 1.0})

    watch = Timing(table=False)
    run(slow_engine(clock, [watch, Logs(), TakeTime(clock, name="sink", on_log=4)], {"loss": 1.0}), [1, 1])
    assert watch.seconds["callback Logs"] == 2 * 1
    records = 2 + 1 + 1 + 1  # those of Logs, the epoch's mean, the last window, and the rates
    assert watch.seconds["callback sink"] == records * 4


def test_compiling_inside_another_span_counts_as_compiling(clock):
    class Compiles(Callback):
        def on_step_end(self, loop):
            clock.advance(8)
            (listener,) = clock.listeners
            listener("/jax/compilation_cache/cache_retrieval_time_sec", 1.0)
            elsewhere = threading.Thread(target=listener, args=(COMPILED, 4.0))
            elsewhere.start()
            elsewhere.join()
            listener(COMPILED, 2.0, fun_name="f")

    watch = Timing(table=False)
    run(slow_engine(clock, [watch, Compiles()]), [1, 1])
    assert (watch.seconds["callback Compiles"], watch.seconds[COMPILE]) == (2 * 6, 2 * 2)


def test_the_first_compilation_is_timed_completely():
    watch = Timing(table=False)
    run(Engine(lambda state, batch: (state + batch, {}), [watch]), [1, 1])
    assert watch.seconds[COMPILE] > watch.seconds[CALL] > 0


def test_it_misses_only_the_first_and_last_event_of_callbacks_before_it(clock):
    events = {"on_load": 1, "on_run_begin": 2, "on_step_end": 4, "on_run_end": 8}
    watch = Timing(table=False)
    callbacks = [TakeTime(clock, name="a", **events), watch, TakeTime(clock, name="b", **events)]
    run(slow_engine(clock, callbacks), [1])
    assert (watch.seconds["callback a"], watch.seconds["callback b"]) == (2 + 4, 1 + 2 + 4 + 8)


def test_the_body_of_a_for_loop_counts_for_the_loop(clock):
    watch = Timing(table=False)
    engine = slow_engine(clock, [watch], steps_per_call=1)
    with engine.steps(jnp.int32(0), [1] * 6, epochs=1, when=every(seconds=4)) as steps:
        for _ in steps:
            clock.advance(1)
    assert watch.seconds == {REST: 3 * 1, CALL: 6 * 2, DATA: 0, WAIT: 0, COMPILE: 0, "callback Timing": 0}


@pytest.mark.parametrize("options", [{"steps_per_call": 4}, {"steps_per_call": "auto"}, {"jit": False}], ids=str)
def test_it_works_for_every_way_of_calling_steps(clock, options):
    watch = Timing(file=(file := io.StringIO()))
    engine = Engine(lambda state, batch: (state + 1, {"loss": batch.sum()}), [watch], log_every=5, **options)
    result = run(engine, batches(clock, 10))
    assert watch.seconds[DATA] == clock.now == 10
    assert result.history["time/examples_per_second"] == [10, 10]
    assert file.getvalue().endswith("10 steps in 10.00 s: 1 steps/s, 10 examples/s\n")


@pytest.mark.parametrize("event", ["load", "run_begin", "step_end", "save", "run_end"])
@pytest.mark.parametrize("fails", [False, True], ids=["without error", "with an error"])
def test_it_stops_listening_however_a_run_ends(monkeypatch, event, fails):
    clock = FakeClock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    callbacks = [Timing(table=False), RaiseIn(event, OSError("disk gone"))][: 1 + fails]
    with pytest.raises(OSError, match="disk gone") if fails else contextlib.nullcontext():
        run(slow_engine(clock, callbacks), [1])
    reads = clock.reads
    assert reads
    jax.monitoring.record_event_duration_secs(COMPILED, 1.0)
    assert clock.reads == reads


def test_two_of_them_see_the_same(clock):
    one, two = Timing(table=False), Timing(table=False)
    run(slow_engine(clock, [one, TakeTime(clock, on_step_end=8), two]), batches(clock, 3))
    assert one.seconds == two.seconds | {"callback Timing_2": 0}


def test_a_second_run_is_timed_from_scratch(clock):
    watch = Timing(table=False)
    engine = slow_engine(clock, [watch])
    run(engine, [1] * 3)
    run(engine, [1] * 5)
    assert watch.seconds[CALL] == 5 * 2


# The table.


def test_the_table_has_the_largest_part_first(clock):
    file = io.StringIO()
    callbacks = [
        TakeTime(clock, name="slow", on_step_end=512),
        TakeTime(clock, name="a", on_run_begin=1),
        TakeTime(clock, on_save=1),
    ]
    run(slow_engine(clock, [Timing(file=file), *callbacks]), batches(clock, 2))
    assert file.getvalue().splitlines() == [
        "callback slow          1024.00 s   99.1%",
        "calling the step          4.00 s    0.4%",
        "data                      2.00 s    0.2%",
        "saving TakeTime           2.00 s    0.2%",
        "other callbacks           1.00 s    0.1%",
        "the loop                  0.00 s    0.0%",
        "compiling                 0.00 s    0.0%",
        "waiting for the step      0.00 s    0.0%",
        "2 steps in 1033.00 s: 0.00194 steps/s, 0.0194 examples/s",
    ]


def test_scalar_batches_have_no_examples(clock):
    file = io.StringIO()
    result = run(slow_engine(clock, [Timing(file=file)], {"loss": 1.0}, log_every=1000), [1] * 1000)
    assert file.getvalue().endswith("\n1,000 steps in 2000.00 s: 0.5 steps/s\n")
    assert "time/examples_per_second" not in result.history


@pytest.mark.parametrize(("rate", "text"), [(12345.6, "12,346"), (99.94, "99.9"), (0.012345, "0.0123")], ids=str)
def test_a_rate_has_three_significant_digits(rate, text):
    assert timing.number_text(rate) == text


@pytest.mark.parametrize("jit", [False, True])
def test_a_failed_run_prints_its_table_and_raises_its_own_error(clock, jit):
    error, file = OSError("disk gone"), io.StringIO()
    engine = Engine(lambda state, batch: (state, {}), [Timing(file=file), TakeTime(clock, on_step_begin=2)], jit=jit)

    @engine.on("step_end", when=2)
    def fail(loop):
        raise error

    with pytest.raises(OSError, match="disk gone") as caught:
        run(engine, [ROWS] * 3)
    assert caught.value is error
    assert error.__notes__ == ["onstep: raised by fail.on_step_end at step 2"]
    assert file.getvalue().endswith("\n2 steps in 4.00 s: 0.5 steps/s, 5 examples/s\n")


def test_the_table_goes_to_stderr(capsys):
    run(Engine(lambda state, batch: (state, {}), [Timing()]), [1])
    captured = capsys.readouterr()
    assert "calling the step" in captured.err
    assert captured.out == ""


def test_a_run_without_steps_prints_nothing(capsys):
    first = run(Engine(lambda state, batch: (state, {})), [1])
    Engine(lambda state, batch: (state, {}), [Timing()]).run(first, [1], epochs=1)
    assert (
        capsys.readouterr().err
        == "onstep: already at step 1 (epoch 1 of 1): nothing to do; raise the target to train further\n"
    )


def test_the_table_can_be_left_out(clock, capsys):
    run(slow_engine(clock, [Timing(table=False)]), [1])
    assert capsys.readouterr().err == ""


# The rates.


def test_rates_and_shares_are_recorded_with_the_training_metrics(clock):
    callbacks = [Timing(table=False), TakeTime(clock, on_step_end=1), TakeTime(clock, on_save=4, when=2)]
    result = run(slow_engine(clock, callbacks, {"loss": 1.0}, log_every=2), batches(clock, 4))
    names = ("steps_per_second", "examples_per_second", "data", "callbacks")
    recorded = {name: result.history[f"time/{name}"] for name in names}
    seconds = 2 + 2 * 2 + 2, 4 + 2 + 2 * 2 + 2  # a save comes after the record of its step
    assert recorded == {
        "steps_per_second": [2 / s for s in seconds],
        "examples_per_second": [2 / s * 10 for s in seconds],
        "data": [2 / seconds[0], 2 / seconds[1]],
        "callbacks": [2 / seconds[0], (4 + 2) / seconds[1]],
    }
    assert result.history.steps("time/data") == [2, 4]


def test_compiling_does_not_lower_a_recorded_rate(clock):
    engine = slow_engine(clock, [Timing(table=False)], {"loss": 1.0}, log_every=1)

    @engine.on("step_end")
    def compiles(loop):
        clock.advance(8)
        clock.listeners[0](COMPILED, 8.0)

    result = run(engine, [1, 1])
    assert result.history["time/steps_per_second"] == [0.5, 0.5]
    assert result.history["time/compiling"] == [8, 8]


def test_a_resumed_run_counts_from_its_first_step(clock):
    file = io.StringIO()
    first = run(slow_engine(clock, [], {"loss": 1.0}), [1] * 100)
    engine = slow_engine(clock, [Timing(file=file)], {"loss": 1.0}, log_every=5)
    result = engine.run(first, [1] * 100, steps=105)
    assert result.history["time/steps_per_second"] == [0.5]
    assert file.getvalue().endswith("\n5 steps in 10.00 s: 0.5 steps/s\n")


def test_a_step_has_one_record_of_rates_when_several_callbacks_log_training_metrics(clock):
    first = run(slow_engine(clock, [], {"loss": 1.0}), [1] * 4)
    before, after = Callback(), Callback()
    before.on_run_begin = lambda loop: loop.log({"train/size": 1})
    after.on_step_end = lambda loop: loop.log({"train/lr": 1}) if loop.step == 6 else None
    engine = slow_engine(clock, [before, Timing(table=False), after], {"loss": 1.0}, log_every=2)
    assert run(engine, [1] * 4, first, epochs=2).history.steps("time/steps_per_second") == [6, 8]


def test_examples_are_counted_in_the_first_batch(clock):
    data = [ROWS, ROWS, ROWS[:4]]
    engine = Engine(lambda state, batch: (state, {"loss": batch.sum()}), [Timing(table=False)], log_every=3)
    engine.on("step_begin")(lambda loop: clock.advance(1))
    with pytest.warns(UserWarning, match="batch"):  # the short one
        result = run(engine, data)
    assert result.history["time/examples_per_second"] == [10]


# The use of the device.


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_mfu_is_the_share_of_the_peak_that_the_products_of_a_step_use(clock, monkeypatch, steps_per_call):
    monkeypatch.setitem(timing.PEAK, jax.devices()[0].device_kind, 1000.0)
    engine = Engine(
        lambda state, batch: (state, {"loss": jnp.sum(batch @ state)}),
        [Timing(table=False)],
        log_every=4,
        steps_per_call=steps_per_call,
    )
    data = [np.zeros((5, 2), np.float32)] * 4
    engine.on("step_end", when=4)(lambda loop: clock.advance(16))
    result = engine.run(jnp.zeros((2, 3)), data, epochs=1)
    assert result.history["time/mfu"] == [pytest.approx(2 * 5 * 2 * 3 / 1000 * 4 / 16)]


@pytest.mark.parametrize(("peak", "jit"), [(0, True), (1000.0, False)], ids=["unknown", "not compiled"])
def test_there_is_no_mfu_for_an_unknown_device_or_an_uncompiled_step(clock, monkeypatch, peak, jit):
    monkeypatch.setitem(timing.PEAK, jax.devices()[0].device_kind, peak)
    engine = Engine(lambda s, b: (s, {"loss": jnp.sum(b @ s)}), [Timing(table=False)], log_every=1, jit=jit)
    result = engine.run(jnp.zeros((2, 3)), batches(clock, 2), epochs=1)
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
    ids=["product", "batch of products", "scan", "convolution", "strided", "gradient", "gradient of a kernel", "sum"],
)
def test_flops_are_counted_in_products_and_convolutions(function, arguments, flops):
    assert count_flops(jax.jit(function).trace(*arguments).jaxpr) == flops


# Spans, which Timing is made of.


class Callers(Callback):
    """Notes whether its handler, the data and the step were called by way of a span."""

    def __init__(self):
        self.by_span = []

    def look(self):
        self.by_span.append(any(frame.filename.endswith("spans.py") for frame in inspect.stack()))

    def on_step_end(self, loop):
        self.look()

    def data(self, epoch):
        self.look()
        yield 1.0

    def step(self, state, batch):
        self.look()
        return state, {"loss": batch}


class ReportsOnly(Observer):
    def progress(self, name, done, total):
        pass


class ReportsEnds(Observer):
    def end(self, span):
        pass


@pytest.mark.parametrize(
    ("observers", "wrapped"),
    [([], False), ([ReportsOnly()], False), ([ReportsOnly(), ReportsEnds()], True), ([ReportsEnds()], True)],
    ids=["none", "progress", "both", "spans"],
)
def test_only_an_observer_of_spans_puts_itself_between_the_loop_and_what_it_calls(observers, wrapped):
    callers = Callers()
    engine = Engine(callers.step, [callers], jit=False)
    engine.on("run_begin")(lambda loop: [loop.observe(observer) for observer in observers])
    run(engine, callers.data)
    assert callers.by_span == [wrapped] * 3


def test_a_resumed_run_is_not_observed_by_the_observers_of_the_first():
    class Count(Observer):
        seen = 0

        def begin(self, span):
            self.seen += 1

    count, data = Count(), iter([1, 2, 3, 4])
    engine = Engine(lambda state, batch: (state + batch, {}))
    engine.on("run_begin")(lambda loop: loop.observe(count) if loop.step == 0 else None)
    first = run(engine, data, steps=2, epochs=None)
    seen = count.seen
    assert int(run(engine, data, first, steps=4, epochs=None).state) == 10
    assert count.seen == seen > 0


def test_an_observer_that_is_added_inside_a_span_does_not_see_its_end():
    class Nesting(Observer):
        def __init__(self):
            self.open = []

        def begin(self, span):
            self.open.append(span)

        def end(self, span):
            assert self.open.pop() == span

    observers = [Nesting(), Nesting()]
    engine = Engine(lambda state, batch: (state + batch, {}))
    engine.on("load")(lambda loop: loop.observe(observers[0]))
    engine.on("step_end", when=1)(lambda loop: loop.observe(observers[1]) if loop.step == 1 else None)
    run(engine, [1, 2])
    assert [observer.open for observer in observers] == [[], []]


def test_it_shows_itself_as_the_call_that_made_it():
    assert repr(Timing()) == "Timing()"
    assert repr(Timing(table=False, name="times")) == "Timing(table=False, name='times')"
