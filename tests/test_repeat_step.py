"""RepeatStep: two calls of a step on copies are compared bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine, Loop
from onstep.callbacks import EMA, RepeatStep
from onstep.sharding import make_mesh


def step(state, batch):
    return {"w": state["w"] * 0.9 + batch}, {"loss": state["w"].sum()}


START = {"w": jnp.arange(8.0)}
DATA = [np.full(8, n, np.float32) for n in range(20)]


@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"steps_per_call": 4}, {"jit": False}], ids=str)
def test_repeated_steps_change_nothing_and_raise_no_alarm(options):
    plain = Engine(step, [EMA(0.9, of="w")], **options).run(START, DATA, epochs=2)
    repeated = Engine(step, [EMA(0.9, of="w"), RepeatStep(1)], **options).run(START, DATA, epochs=2)
    assert repeated.state["w"].tobytes() == plain.state["w"].tobytes()
    assert repeated.history == plain.history


def test_repeated_steps_on_a_mesh():
    result = Engine(step, [RepeatStep(3)], mesh=make_mesh()).run(START, DATA, epochs=1)
    plain = Engine(step, mesh=make_mesh()).run(START, DATA, epochs=1)
    assert result.state["w"].tobytes() == plain.state["w"].tobytes()


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_bit_that_is_flipped_in_either_call_is_found(call, steps_per_call, monkeypatch):
    tried, calls = Loop.try_step, []

    def faulty(loop):
        state, carries, metrics = tried(loop)
        calls.append(loop.step)
        if len(calls) == 4 + call:  # at the third comparison
            bits = np.array(state["w"])
            bits.view(np.uint32)[5] ^= 1
            state = {"w": jnp.asarray(bits)}
        return state, carries, metrics

    monkeypatch.setattr(Loop, "try_step", faulty)
    engine = Engine(step, [RepeatStep(2)], steps_per_call=steps_per_call)
    with pytest.raises(RuntimeError, match=r"two calls of step 6 .* differ in state/w \(1 of 8\)\. The device"):
        engine.run(START, DATA, epochs=1)


def test_step_that_is_not_deterministic_is_found():
    count = iter(range(100))

    def random(state, batch):
        noise = jax.pure_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), jnp.float32))
        return state + noise, {}

    with pytest.raises(RuntimeError, match="differ in state"):
        Engine(random, [RepeatStep(1)]).run(jnp.float32(0), DATA, epochs=1)


def test_nan_is_equal_to_itself():
    nan = {"w": jnp.full(8, jnp.nan)}
    assert Engine(step, [RepeatStep(1)]).run(nan, DATA, epochs=1).step == 20


def test_step_is_tried_in_on_step_begin_only():
    class Early(Callback):
        def on_step_end(self, loop):
            loop.try_step()

    with pytest.raises(RuntimeError, match="try_step can only be called in on_step_begin"):
        Engine(step, [Early()]).run(START, DATA, epochs=1)
