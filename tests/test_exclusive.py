"""One run at a time uses an engine and its callbacks."""

import threading

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine
from onstep.callbacks import EarlyStopping
from onstep.testing import counting_step as add

RUNNING = "is in use by a run that has not ended"


class Average(Callback):
    """The mean of the states seen in a run, kept on the host."""

    def on_run_begin(self, loop):
        self.seen = []

    def on_step_end(self, loop):
        self.seen.append(int(loop.state))


def test_run_inside_a_callback_of_the_same_engine_is_refused_and_disturbs_nothing():
    average = Average()
    engine = Engine(add, [average])
    refusals = []

    @engine.on("step_end", when=2)
    def run_again(loop):
        with pytest.raises(RuntimeError, match=f"This engine {RUNNING}") as refused:
            engine.run(jnp.int32(100), [1, 1], epochs=1)
        refusals.append(refused)

    result = engine.run(jnp.int32(0), [1, 2, 3, 4], epochs=1)
    assert (int(result.state), average.seen, len(refusals)) == (10, [1, 3, 6, 10], 2)


def test_run_inside_the_body_of_a_for_is_refused():
    engine = Engine(add)
    with engine.steps(jnp.int32(0), [1, 2], epochs=1) as steps:
        for _ in steps:
            with pytest.raises(RuntimeError, match=RUNNING):
                engine.run(jnp.int32(0), [1], epochs=1)
    assert int(steps.result.state) == 3


def test_steps_that_were_made_but_not_begun_disturb_no_run():
    stopping = EarlyStopping("train/loss", patience=2)
    engine = Engine(add, [stopping], log_every=1)
    with engine.steps(jnp.int32(0), [3, 4, 5, 6], epochs=1) as steps:
        for loop in steps:
            if loop.step == 1:
                later = engine.steps(jnp.int32(0), [1], epochs=1)
    assert steps.result.step == 3  # stopped: the best value and the misses were not reset
    with later as steps:
        assert [int(loop.state) for loop in steps] == [1]


def test_callback_of_a_run_is_refused_in_another_engine_meanwhile():
    average = Average()
    inner = Engine(add, [average])

    class Outer(Callback):
        def on_step_end(self, loop):
            inner.run(jnp.int32(0), [1], epochs=1)

    with pytest.raises(RuntimeError, match=f"Average {RUNNING}"):
        Engine(add, [average, Outer()]).run(jnp.int32(0), [1], epochs=1)
    assert int(inner.run(jnp.int32(0), [1], epochs=1).state) == 1  # the failed run released it


def test_another_engine_may_run_inside_a_callback():
    inner = Engine(add, [Average()])
    results = []
    outer = Engine(add, [Average()])
    outer.on("step_end")(lambda loop: results.append(int(inner.run(jnp.int32(0), [loop.step], epochs=1).state)))
    assert int(outer.run(jnp.int32(0), [1, 1, 1], epochs=1).state) == 3
    assert results == [1, 2, 3]


def test_run_in_another_thread_is_refused():
    engine = Engine(add)
    begun, checked, errors = threading.Event(), threading.Event(), []

    @engine.on("step_end")
    def wait(loop):
        begun.set()
        checked.wait(20)

    thread = threading.Thread(target=lambda: engine.run(jnp.int32(0), [1], epochs=1))
    thread.start()
    begun.wait(20)
    try:
        engine.run(jnp.int32(0), [1], epochs=1)
    except RuntimeError as error:
        errors.append(str(error))
    checked.set()
    thread.join(20)
    assert len(errors) == 1
    assert RUNNING in errors[0]
