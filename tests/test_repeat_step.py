"""RepeatStep: two calls of a step on copies are compared bit by bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from onstep import Callback, Engine, Loop
from onstep.callbacks import EMA, GradNorm, RepeatStep
from onstep.sharding import make_mesh
from onstep.testing import same_bytes

KEY = jax.random.key(2)
START = {"w": jnp.arange(8.0), "half": jnp.ones(3, jnp.bfloat16), "nan": jnp.full(2, jnp.nan), "key": KEY}
DATA = [np.full(8, n, np.float32) for n in range(20)]


def step(state, batch, rng):
    noise = jax.random.normal(rng, (8,))
    new = {"w": state["w"] * 0.9 + batch + noise, "key": jax.random.fold_in(state["key"], 1)}
    return {**state, **new}, {"loss": state["w"].sum(), "ratio": jnp.nan}, {"grads": noise}


def run(*callbacks, data=DATA, **options):
    """Run with compiled halves that are due at every step and at every third."""
    halves = [EMA(0.9, of="w"), GradNorm(when=3)]
    return Engine(step, [*halves, *callbacks], log_every=5, **options).run(START, data, epochs=1, rng=KEY)


MODES = {
    "plain": lambda: {"steps_per_call": 1},
    "blocks": lambda: {"steps_per_call": 4},
    "uncompiled": lambda: {"jit": False},
    "mesh": lambda: {"mesh": make_mesh()},
}


class Swap(Callback):
    """Replaces a batch before it is repeated."""

    when = 6

    def on_step_begin(self, loop):
        loop.batch = loop.batch + 1


@pytest.mark.parametrize("mode", MODES)
def test_repeated_steps_change_nothing_and_raise_no_alarm(mode):
    data = DATA[:7] if mode == "uncompiled" else DATA  # which is slow
    plain = run(Swap(), data=data, **MODES[mode]())
    repeated = run(Swap(), RepeatStep(1), data=data, **MODES[mode]())
    assert same_bytes(repeated.snapshot.tree, plain.snapshot.tree)
    assert repr(dict(repeated.history)) == repr(dict(plain.history))


@pytest.mark.parametrize("steps_per_call", [1, 100])
def test_many_repeated_steps_raise_no_alarm(steps_per_call):
    def step(state, batch):
        return {"w": jnp.tanh(state["w"] @ state["w"]) + batch}, {}

    engine = Engine(step, [RepeatStep(1)], log_every=1000, steps_per_call=steps_per_call)
    assert engine.run({"w": jnp.ones((16, 16))}, itertools.repeat(np.float32(0.1)), steps=1000).step == 1000


def flip(array, device=None):
    """Return an array with one bit of one number changed, on one of its devices only."""
    parts = []
    for shard in array.addressable_shards:
        bits = np.array(shard.data)
        if device in (None, shard.device):
            bits.view(np.uint32).flat[-1] ^= 1
        parts.append(jax.device_put(bits, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def break_call(monkeypatch, number, device=None):
    """Let the device compute a wrong bit in one call of `try_step`."""
    tried, calls = Loop.try_step, itertools.count(1)

    def faulty(loop):
        state, carries, metrics = tried(loop)
        return (state | {"w": flip(state["w"], device)} if next(calls) == number else state), carries, metrics

    monkeypatch.setattr(Loop, "try_step", faulty)


@pytest.mark.parametrize("call", [5, 6])  # the third comparison
@pytest.mark.parametrize("mode", ["plain", "blocks"])
def test_bit_that_is_flipped_in_either_call_is_found(call, mode, monkeypatch):
    break_call(monkeypatch, call)
    with pytest.raises(
        RuntimeError, match=r"two calls of step 6 .* differ in state/w \(1 of 8\) on cpu:0\. The device"
    ):
        run(RepeatStep(2), **MODES[mode]())


@pytest.mark.parametrize("divided", [False, True])
def test_bit_that_one_of_many_devices_computes_wrongly_is_found(divided, monkeypatch):
    mesh = make_mesh()
    break_call(monkeypatch, 2, jax.devices()[3])
    spec = PartitionSpec("data") if divided else PartitionSpec()
    state = {"w": jax.device_put(jnp.arange(8.0), NamedSharding(mesh, spec))}
    engine = Engine(lambda s, b: ({"w": s["w"] + b.sum()}, {}), [RepeatStep(1)], mesh=mesh)
    size = 1 if divided else 8
    with pytest.raises(RuntimeError, match=rf"differ in state/w \(1 of {size}\) on cpu:3\. The device"):
        engine.run(state, DATA, epochs=1)


def test_step_that_is_not_deterministic_is_found():
    count = itertools.count()

    def random(state, batch):
        noise = jax.pure_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), jnp.float32))
        return state + noise, {}

    with pytest.raises(RuntimeError, match="differ in state"):
        Engine(random, [RepeatStep(1)]).run(jnp.float32(0), DATA, epochs=1)


def test_step_is_tried_in_on_step_begin_only():
    class Early(Callback):
        def on_step_end(self, loop):
            loop.try_step()

    with pytest.raises(RuntimeError, match="try_step can only be called in on_step_begin"):
        Engine(step, [Early()]).run(START, DATA, epochs=1, rng=KEY)
