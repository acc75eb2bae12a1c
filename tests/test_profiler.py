"""A trace of a few steps: which steps it contains, and that it is always written and closed."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest
from onstep import Engine, at
from onstep.callbacks.profiler import Profiler


def traced_engine(*profilers):
    """An engine whose uncompiled steps leave their names in a trace."""

    def step(state, batch):
        with jax.profiler.TraceAnnotation(f"step {batch}"):
            return state, {}

    return Engine(step, profilers, jit=False)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Waiting for the state leaves its name in a trace, too."""
    wait = jax.block_until_ready

    def block_until_ready(tree):
        with jax.profiler.TraceAnnotation("wait"):
            return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)


def run(engine, steps, state=None):
    return engine.run(jnp.int32(0) if state is None else state, range(1, 100), steps=steps)


def traced(directory):
    """Return the names that the steps left in the only trace in a directory, in order."""
    return [name for name in names(directory) if re.fullmatch(r"step \d+|wait", name)]


def names(directory):
    """Return the names of all events in the only trace in a directory, in order."""
    (xplane,) = directory.glob("plugins/profile/*/*.xplane.pb")
    (trace,) = directory.glob("plugins/profile/*/*.trace.json.gz")
    assert xplane.stat().st_size > 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in sorted(events, key=lambda event: event.get("ts", 0)) if "name" in event]


def test_the_chosen_steps_are_traced_until_their_computation_ends(tmp_path):
    run(traced_engine(Profiler(tmp_path, start=3, steps=2)), 9)
    assert traced(tmp_path) == ["step 4", "step 5", "wait"]


@pytest.mark.parametrize(("options", "steps"), [({}, range(11, 16)), ({"start": 1, "steps": 1}, [2])], ids=str)
def test_the_first_and_number_of_steps_can_be_chosen(tmp_path, options, steps):
    run(traced_engine(Profiler(str(tmp_path), **options)), 20)
    assert traced(tmp_path) == [*(f"step {n}" for n in steps), "wait"]


def test_it_is_due_only_at_the_first_and_last_step_or_one_later():
    assert Profiler("runs").when == at(11, 12, 15, 16)
    assert Profiler("runs", steps=1).when == at(11, 12)


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_compilation_is_not_traced(tmp_path, steps_per_call):
    def step(state, batch):
        return state + batch, {}

    Engine(step, [Profiler(tmp_path, start=0, steps=3)], steps_per_call=steps_per_call).run(
        jnp.int32(0), [1] * 9, epochs=1
    )
    assert not [name for name in names(tmp_path) if "compile" in name.lower()]


def test_a_run_that_ends_during_the_trace_writes_it(tmp_path):
    run(traced_engine(Profiler(tmp_path, start=3, steps=9)), 5)
    assert traced(tmp_path) == ["step 4", "step 5"]


def test_a_run_that_fails_during_the_trace_writes_it(tmp_path):
    failing = traced_engine(Profiler(tmp_path, start=3))
    error = OSError("disk gone")

    @failing.on("step_end", when=5)
    def fail(loop):
        raise error

    with pytest.raises(OSError, match="disk gone") as caught:
        run(failing, 9)
    assert caught.value is error
    assert traced(tmp_path) == ["step 4", "step 5"]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_before_the_trace_writes_nothing(tmp_path, steps):
    run(traced_engine(Profiler(tmp_path, start=3)), steps)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [4, 7, 9])
def test_a_run_that_resumes_after_the_first_traced_step_writes_nothing(tmp_path, steps):
    first = run(Engine(lambda state, batch: (state, {}), steps_per_call=1), steps)
    run(traced_engine(Profiler(tmp_path, start=3, steps=4)), 12, first)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("start", "traces"), [(0, [2, 3]), (3, [5, 6]), (4, [5, 6])])
def test_the_first_step_of_a_run_is_never_traced(tmp_path, start, traces):
    first = run(Engine(lambda state, batch: (state, {}), steps_per_call=1), 3) if start else None
    run(traced_engine(Profiler(tmp_path, start=start, steps=2)), 12, first)
    assert traced(tmp_path) == [*(f"step {n}" for n in traces), "wait"]


def test_two_profilers_trace_one_after_the_other(tmp_path):
    run(traced_engine(Profiler(tmp_path / "a", start=1, steps=2), Profiler(tmp_path / "b", start=3, steps=2)), 9)
    assert traced(tmp_path / "a") == ["step 2", "step 3", "wait"]
    assert traced(tmp_path / "b") == ["step 4", "step 5", "wait"]


def test_another_trace_is_an_error_and_continues(tmp_path):
    jax.profiler.start_trace(str(tmp_path))
    with pytest.raises(RuntimeError, match="Profiler needs to start a trace at step 11, but another trace is running"):
        run(traced_engine(Profiler(tmp_path / "other")), 20)
    jax.profiler.stop_trace()
    assert traced(tmp_path) == [f"step {n}" for n in range(1, 11)]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"start": -1}, "start to be a whole number >= 0"), ({"steps": 0}, "steps to be a whole number >= 1")],
    ids=str,
)
def test_steps_out_of_range_are_an_error(options, says):
    with pytest.raises(ValueError, match=f"Profiler needs {says}"):
        Profiler("runs", **options)


def test_steps_in_blocks_are_traced_too(tmp_path):
    step = jax.jit(lambda state, batch: (state + batch, {"loss": state}))
    result = Engine(step, [Profiler(tmp_path, start=2, steps=8)], steps_per_call=4).run(
        jnp.int32(0), [1] * 20, epochs=1
    )
    assert int(result.state) == 20
    assert traced(tmp_path) == ["wait"]


def test_it_shows_itself_as_the_call_that_made_it():
    assert repr(Profiler("runs", start=3)) == "Profiler('runs', start=3)"
