"""When the host waits for the device, and what is compiled, donated and kept in memory."""

import gc
import io
import os
import time
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import Tripwire, compilations
from onstep import Batches, Callback, Engine, at, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GradNorm, Progress, TensorBoard
from onstep.compiled.throttle import Throttle
from onstep.testing import FakeClock


def tripwired(engine, reads):
    """Replace the compiled call of the engine by a function that returns tripwires."""
    steps = iter(range(1, 10**9))
    engine._compiled.call = lambda bundle, batch, rng, due: (bundle, {"loss": Tripwire(next(steps), reads)})
    return engine


def step(state, batch):
    return state + batch, {"loss": state * 1.0}


class Idle(Callback):
    """Handle events without reading a value."""

    when = every(7)

    def __init__(self, reads=()):
        self.reads, self.at = reads, []

    def on_step_begin(self, loop):
        self.at.append(len(self.reads))

    on_step_end = on_save = on_step_begin


def test_metrics_are_read_only_at_log_steps():
    reads = []
    idle = Idle(reads)
    engine = tripwired(Engine(step, [idle], log_every=20, steps_per_call=1), reads)
    with engine.steps(jnp.int32(0), range(100), epochs=1, when=1) as steps:
        seen = [(loop.step, len(reads)) for loop in steps]
    assert seen == [(n, n // 20 * 20) for n in range(1, 101)]
    assert sorted(reads) == list(range(1, 101))


def test_hundred_steps_logged_every_ten_are_read_ten_times():
    reads, points = [], []
    engine = tripwired(Engine(step, log_every=10, steps_per_call=1), reads)
    engine.on("log")(lambda loop, record: points.append((loop.step, len(reads))))
    engine.run(jnp.int32(0), range(1000), steps=100)
    assert points == [(n, n) for n in range(10, 101, 10)]


def slow_step(state, batch):
    for _ in range(12):
        state = jnp.tanh(state @ state) * 0.5 + 0.1
    return state, {"loss": state[0, 0]}, {"grads": state}


def built_in(tmp_path):
    ema = EMA(of=None)
    evaluate = Evaluate(lambda state, batch: {"x": state[0, 0]}, [np.zeros(1)], using=ema, when=20)
    progress = Progress(interval=1000, file=io.StringIO())
    return [ema, GradNorm(), evaluate, Checkpoint(tmp_path, when=20), TensorBoard(tmp_path), progress]


def test_host_runs_ahead_of_the_device_until_something_is_due(tmp_path):
    engine = Engine(slow_step, built_in(tmp_path), log_every=20, in_flight=32)
    state = jnp.full((500, 500), 0.01)
    engine.run(state, range(400), steps=20)  # compiles
    for target in (40, 60, 80):  # the machine may be busy: one undisturbed measurement is enough
        times = [time.perf_counter()]
        with engine.steps(state, range(400), steps=target, when=19) as steps:
            for _ in steps:
                times.append(time.perf_counter())
        times.append(time.perf_counter())
        ahead, whole = times[1] - times[0], times[2] - times[0]
        if ahead < 0.25 * whole:
            break
    assert ahead < 0.25 * whole, f"the steps before the due one kept the host for {ahead:.3f} s of {whole:.3f} s"


def test_host_that_reads_every_step_does_not_run_ahead():
    engine = Engine(slow_step, log_every=20, in_flight=32)
    engine.on("step_end")(lambda loop: float(loop.metrics["loss"]))
    state = jnp.full((500, 500), 0.01)
    engine.run(state, range(40), steps=20)
    times = [time.perf_counter()]
    with engine.steps(state, range(40), steps=20, when=19) as steps:
        for _ in steps:
            times.append(time.perf_counter())
    times.append(time.perf_counter())
    assert times[1] - times[0] > 0.5 * (times[2] - times[0])


@pytest.mark.parametrize(("seconds", "more"), [(1e-3, 0), (1e-6, 15)], ids=["long calls", "short calls"])
def test_no_more_calls_than_in_flight_are_queued(seconds, more):
    finished, started, most, clock = set(), [], [], FakeClock()

    class Handle:
        shape = ()

        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            finished.update(range(self.number + 1))

        def __array__(self, *args, **kwargs):
            self.block_until_ready()
            return np.zeros(())

    def call(bundle, batch, rng, due):
        started.append(len(started))
        clock.advance(seconds)
        most.append(len(started) - len(finished))
        return bundle, {"loss": Handle(started[-1])}

    for in_flight in (1, 2, 5):
        finished.clear(), started.clear(), most.clear()
        engine = Engine(step, in_flight=in_flight, log_every=30, steps_per_call=1, clock=clock)
        engine._compiled.call = call
        engine.run(jnp.int32(0), range(100), epochs=1)
        assert max(most) == in_flight + 1 + more  # the call being started, in addition to those that are queued


class Logs(Callback):
    """Log a metric at some steps."""

    def __init__(self, update_when):
        self.update_when = update_when

    def update(self, carry, ctx):
        return carry, ctx.log(x=1.0)


@pytest.mark.parametrize("callbacks", [[], [Logs(10)]], ids=["at all", "at most steps"])
def test_calls_without_metrics_are_awaited_as_well(callbacks):
    finished, started, most, clock = set(), [], [], FakeClock()

    class Handle(Tripwire):
        def block_until_ready(self):
            finished.update(range(self.step + 1))

    def call(*args):
        started.append(len(started))
        clock.advance(1e-3)
        most.append(len(started) - len(finished))
        bundle, metrics = compiled(*args)
        return bundle, jax.tree.map(lambda _: Handle(started[-1], []), metrics)

    engine = Engine(lambda state, batch: (state, {}), callbacks, in_flight=2, steps_per_call=1, clock=clock)
    seen = []
    engine.on("step_end", when=7)(lambda loop: seen.append(dict(loop.metrics)))
    compiled, engine._compiled.call = engine._compiled.call, call
    engine.run(jnp.int32(0), range(29), epochs=1)
    assert max(most) == 3
    assert seen == [{}] * 4


def test_blocks_without_metrics_have_something_to_wait_for():
    waits = []
    engine = Engine(lambda state, batch: (state, {}), in_flight=1, steps_per_call=4)
    engine.on("step_end", when=4)(lambda loop: waits.append([m.columns.done.shape for m in loop._windows.pending]))
    engine.run(jnp.int32(0), range(8), epochs=1)
    assert waits == [[(4,)], [(4,), (4,)]]


def test_steps_longer_than_the_limit_are_run_one_at_a_time():
    clock = FakeClock()
    throttle = Throttle(2, clock, adapt=True)
    first = throttle.most_steps(0)
    clock.advance(10.0 * first)
    assert throttle.most_steps(first) == 1


def test_arrays_of_the_caller_stay_valid_and_are_not_aliased():
    params = jnp.ones(3)
    state = {"params": params, "target": params, "numpy": np.zeros(2), "number": 0, "key": jax.random.key(0)}

    def all_change(state, batch):
        changed = {name: state[name] + 1 for name in ("params", "target", "numpy", "number")}
        return changed | {"key": jax.random.split(state["key"])[0]}, {}

    result = Engine(all_change).run(state, range(3), epochs=1)
    assert (params + 0).tolist() == [1, 1, 1]
    assert state["numpy"].tolist() == [0, 0]
    assert result.state["target"].tolist() == [4, 4, 4]
    assert int(result.state["number"]) == 3


def test_donate_deletes_the_state_of_the_caller_even_if_leaves_are_shared():
    shared = jax.device_put(jnp.ones(3), jax.devices()[0])
    result = Engine(lambda s, b: ({k: v + 1 for k, v in s.items()}, {})).run(
        {"a": shared, "b": shared}, range(2), epochs=1, donate=True
    )
    assert shared.is_deleted()
    assert result.state["b"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_carry_may_begin_as_the_state_itself(steps_per_call):
    class Keeps(Callback):
        def init(self, state):
            return state, state

        def update(self, carry, ctx):
            return (carry[0], ctx.state), ctx

    keeps, state = Keeps(), {"w": jnp.ones(3)}
    result = Engine(lambda s, b: ({"w": s["w"] + b}, {}), [keeps], steps_per_call=steps_per_call).run(
        state, [1.0] * 8, epochs=1
    )
    assert [part["w"].tolist() for part in result.carry(keeps)] == [[1, 1, 1], [9, 9, 9]]


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_state_and_carries_are_donated_to_the_next_call(steps_per_call):
    engine, earlier = Engine(step, [EMA(0.5, of=None)], steps_per_call=steps_per_call), []
    engine.on("step_end", when=4)(lambda loop: earlier.append(jax.tree.leaves((loop.state, loop.carries))))
    engine.run(jnp.float32(0), [1.0] * 12, epochs=1)
    assert [all(leaf.is_deleted() for leaf in leaves) for leaves in earlier] == [True, True, False]


def test_result_stays_valid_after_another_run_resumes_from_it():
    engine = Engine(step, [EMA(0.5, of=None)])
    first = engine.run(jnp.float32(1), [1.0, 1.0], epochs=1)
    second = engine.run(first, [1.0, 1.0], epochs=2)
    third = engine.run(first, [1.0, 1.0], epochs=3)
    assert (float(first.state), float(second.state), float(third.state)) == (3, 5, 7)


def test_result_is_neither_copied_nor_kept_by_the_run_that_resumes_from_it():
    def states():
        return sum(array.shape == (1234,) for array in jax.live_arrays())

    engine = Engine(lambda state, batch: (state + batch, {}))
    first = engine.run(jnp.zeros(1234), [1.0] * 4, steps=2)
    kept, before, seen = weakref.ref(first.state), states(), []
    steps = engine.steps(first, [1.0] * 4, steps=4)
    assert states() == before
    del first
    with steps:
        for _ in steps:
            seen.append(kept() is None)
    assert seen == [True, True]
    assert steps.result.state[0] == 4


def test_one_executable_serves_the_whole_run_and_the_next():
    ema = EMA(0.9, of=None)
    engine = Engine(lambda s, b, rng: (s + b.sum(), {"loss": s}), [ema, GradLike(when=3)], log_every=4)
    data = Batches(np.arange(12, dtype=np.float32), 2)
    engine.run(0.0, data, epochs=2, rng=jax.random.key(0))
    assert engine._compiled.call._cache_size() == 1
    with compilations() as compiled:
        engine.run(0.0, data, epochs=2, rng=jax.random.key(0))
    assert compiled == []
    assert engine._compiled.call._cache_size() == 1


class GradLike(Callback):
    """A compiled half that is not due at every step and logs."""

    def __init__(self, when):
        self.update_when = when

    def update(self, carry, ctx):
        return carry, ctx.log(seen=ctx.step)


def test_python_number_in_the_state_does_not_compile_twice():
    engine = Engine(lambda s, b: ({"step": s["step"] + 1, "lr": s["lr"], "reset": 0}, {}), steps_per_call=1)
    result = engine.run({"step": 0, "lr": 0.1, "reset": 3}, range(5), epochs=1)
    assert engine._compiled.call._cache_size() == 1
    assert result.state["step"].dtype == jnp.int32


def test_resumed_run_reuses_the_executable(tmp_path):
    engine = Engine(step, [Checkpoint(tmp_path, when=2)])
    engine.run(jnp.int32(0), range(4), steps=3)
    engine.run(jnp.int32(0), range(4), steps=4)
    assert engine._compiled.call._cache_size() == 1


def test_64_bit_numpy_batches_do_not_compile_again():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(step).run(0.0, [np.float64(1), 1.0, np.asarray(2.0)], epochs=1)


def test_memory_stays_flat_over_many_steps():
    def many(state, batch):
        return state + 1, {f"m{i}": state * i for i in range(5)}

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    engine = Engine(many, log_every=100)
    batch, points = np.float32(0), []
    with engine.steps(jnp.float32(0), iter(lambda: batch, None), steps=20_000, when=5_000) as steps:
        for _ in steps:
            gc.collect()
            points.append((len(jax.live_arrays()), resident()))
    arrays, memory = zip(*points, strict=True)
    assert max(arrays) - min(arrays) <= 10
    assert memory[-1] - memory[0] < 20e6


def test_error_of_a_donated_state_names_the_callback_that_kept_it():
    class Keeps(Callback):
        kept = None

        def on_step_end(self, loop):
            if loop.step == 3:
                self.kept = loop.state
            if loop.step == 5:
                float(self.kept)

    with pytest.raises(RuntimeError, match="deleted") as caught:
        Engine(step, [Keeps()]).run(jnp.int32(0), range(9), epochs=1)
    notes = "\n".join(caught.value.__notes__)
    assert "Keeps.on_step_end at step 5" in notes
    assert "Keep a copy instead" in notes


def test_uncompiled_steps_see_concrete_values():
    seen = []

    def looks(state, batch):
        seen.append(float(state))
        return state + batch, {"loss": state}

    callbacks = [EMA(0.5, of=None), GradLike(when=2)]
    engine = Engine(looks, callbacks, jit=False, steps_per_call=4, log_every=2)
    result = engine.run(jnp.float32(0), [np.float32(1)] * 6, epochs=1)
    assert seen == list(range(6))
    assert float(result.state) == 6
    assert result.history["train/seen"] == [1, 3, 5]


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
def test_print_inside_the_step_comes_once_per_step_and_in_order(steps_per_call, capsys):
    def says(state, batch):
        jax.debug.print("state {}", state)
        return state + batch, {"loss": state}

    Engine(says, steps_per_call=steps_per_call).run(jnp.int32(0), [1] * 60, epochs=2)
    jax.effects_barrier()
    assert capsys.readouterr().out == "".join(f"state {n}\n" for n in range(120))


def test_number_of_metrics_on_the_device_is_bounded_in_a_long_window(monkeypatch):
    monkeypatch.setattr("onstep.loop.MOST_PENDING", 8)
    pending = []

    class Count(Callback):
        when = 30

        def on_step_end(self, loop):
            pending.append(len(loop._windows.pending))

    engine = Engine(
        lambda state, batch: (state + batch, {"loss": batch * 1.0}), [Count()], log_every=10**9, steps_per_call=1
    )
    result = engine.run(jnp.int32(0), list(range(30)), epochs=1)
    assert pending == [30 % 8]
    assert result.latest["epoch/loss"] == sum(range(30)) / 30


def test_number_of_flags_on_the_device_is_bounded(monkeypatch):
    monkeypatch.setattr("onstep.compiled.step.MOST_CONSTANTS", 6)
    halves, kept = [EMA(0.5, of=None, when=n, name=f"every {n}") for n in (3, 5, 7)], []
    engine = Engine(lambda state, batch: (state + batch, {}), halves, steps_per_call=4, log_every=1000)
    engine.on("step_end", when=10)(lambda loop: kept.append(len(engine._compiled._constants)))
    result = engine.run(jnp.float32(0), [1.0] * 200, epochs=1)
    assert len(kept) == 20
    assert max(kept) == 6
    assert result.state == 200


def test_counts_of_steps_are_on_the_device_before_the_first_block():
    kept = []
    engine = Engine(step, steps_per_call=4)
    engine.on("step_end", when=at(1, 3, 7))(lambda loop: kept.append(len(engine._compiled._constants)))
    engine.run(jnp.float32(0), [1.0] * 8, epochs=1)
    assert kept == [4, 4, 4]
