"""A trace of a few steps: which ones, and that it is always written and ended."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest
from onstep import Engine, at
from onstep.callbacks.profiler import Profiler


class State:
    """A state that tells the trace when it is waited for."""

    def block_until_ready(self):
        with jax.profiler.TraceAnnotation("waits"):
            return self


def engine(*profilers):
    """An engine whose steps, plain functions, leave their names in a trace; so does whoever waits for the state."""
    engine = Engine(lambda state, batch: (state, {}), profilers, steps_per_call=1)

    def call(bundle, batch, rng, due):
        with jax.profiler.TraceAnnotation(f"does step {batch}"):
            return (State(), *bundle[1:]), {}

    engine._compiled.call = call
    return engine


def run(engine, steps, state=None):
    return engine.run(jnp.int32(0) if state is None else state, range(1, 100), steps=steps)


def traced(directory):
    """What the steps left in the one trace below a directory, in order."""
    (xplane,) = directory.glob("plugins/profile/*/*.xplane.pb")
    (trace,) = directory.glob("plugins/profile/*/*.trace.json.gz")
    assert xplane.stat().st_size > 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    found = [e for e in events if re.fullmatch(r"does step \d+|waits", e.get("name", ""))]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_the_chosen_steps_are_traced_to_the_end_of_their_computation(tmp_path):
    run(engine(Profiler(tmp_path, start=3, steps=2)), 9)
    assert traced(tmp_path) == ["does step 4", "does step 5", "waits"]


@pytest.mark.parametrize(("options", "steps"), [({}, range(11, 16)), ({"start": 0, "steps": 1}, [1])], ids=str)
def test_the_first_and_number_of_steps_can_be_chosen(tmp_path, options, steps):
    run(engine(Profiler(str(tmp_path), **options)), 20)
    assert traced(tmp_path) == [*(f"does step {n}" for n in steps), "waits"]


def test_it_is_due_at_the_first_and_last_step_alone():
    assert Profiler("runs").when == at(11, 15)


def test_a_run_that_ends_earlier_writes_what_there_is(tmp_path):
    run(engine(Profiler(tmp_path, start=3, steps=9)), 5)
    assert traced(tmp_path) == ["does step 4", "does step 5"]


def test_a_run_that_fails_earlier_writes_what_there_is(tmp_path):
    failing = engine(Profiler(tmp_path, start=3))
    error = OSError("disk gone")

    @failing.on("step_end", when=5)
    def fail(loop):
        raise error

    with pytest.raises(OSError, match="disk gone") as caught:
        run(failing, 9)
    assert caught.value is error
    assert traced(tmp_path) == ["does step 4", "does step 5"]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_before_writes_nothing(tmp_path, steps):
    run(engine(Profiler(tmp_path, start=3)), steps)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [4, 7, 9])
def test_a_run_that_goes_on_behind_the_first_of_them_writes_nothing(tmp_path, steps):
    first = run(Engine(lambda state, batch: (state, {}), steps_per_call=1), steps)
    run(engine(Profiler(tmp_path, start=3, steps=4)), 12, first)
    assert not any(tmp_path.iterdir())


def test_a_run_that_goes_on_just_before_them_traces_them(tmp_path):
    first = run(Engine(lambda state, batch: (state, {}), steps_per_call=1), 3)
    run(engine(Profiler(tmp_path, start=3, steps=1)), 12, first)
    assert traced(tmp_path) == ["does step 4", "waits"]


def test_two_of_them_trace_one_after_the_other(tmp_path):
    run(engine(Profiler(tmp_path / "a", start=1, steps=2), Profiler(tmp_path / "b", start=3, steps=2)), 9)
    assert traced(tmp_path / "a") == ["does step 2", "does step 3", "waits"]
    assert traced(tmp_path / "b") == ["does step 4", "does step 5", "waits"]


def test_another_trace_is_an_error_and_goes_on(tmp_path):
    jax.profiler.start_trace(str(tmp_path))
    with pytest.raises(RuntimeError, match="Profiler needs to start a trace at step 11, but jax has one running"):
        run(engine(Profiler(tmp_path / "other")), 20)
    jax.profiler.stop_trace()
    assert traced(tmp_path) == [f"does step {n}" for n in range(1, 11)]


@pytest.mark.parametrize(("options", "says"), [({"start": -1}, "start >= 0"), ({"steps": 0}, "steps >= 1")], ids=str)
def test_steps_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=f"Profiler needs {says}"):
        Profiler("runs", **options)


def test_blocks_of_steps_are_traced_too(tmp_path):
    step = jax.jit(lambda state, batch: (state + batch, {"loss": state}))
    result = Engine(step, [Profiler(tmp_path, start=2, steps=8)], steps_per_call=4).run(
        jnp.int32(0), [1] * 20, epochs=1
    )
    assert int(result.state) == 20
    assert traced(tmp_path) == []
