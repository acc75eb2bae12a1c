"""Leaves of the state: what they may be, which dtype they have, and what is donated."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine
from onstep.testing import counting_step


@flax.struct.dataclass
class Flax:
    w: Any
    name: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    w: Any
    f: Any


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"w": 1.0, "name": "net"}, r"str at 'name'. Keep it out of the tree: name = state.pop\('name'\)\.$"),
        ({"o": [0, {"f": len}]}, r"builtin.* at 'o/1/f'. Keep it out of the tree: f = state\['o'\]\[1\].pop\('f'\)\.$"),
        (Flax(1.0, "net"), r"str at 'name'. .*: declare name with flax.struct.field\(pytree_node=False\)\.$"),
        (Plain(1.0, len), r"at 'f'. .*: declare f with dataclasses.field\(metadata={'static': True}\)\.$"),
        ((1.0, "net"), r"str at '1'. Keep it out of the tree: a static field, a closure."),
        ("net", "Keep it out of the tree: a static field, a closure."),
        ({"w": np.array(["a"])}, "ndarray of dtype <U1 at 'w'"),
        ({"w": np.array([None])}, "ndarray of dtype object at 'w'"),
        ({"w": np.datetime64("2020")}, r"datetime64 of dtype datetime64\[Y\] at 'w'"),
        ({"w": jax.ShapeDtypeStruct((2,), np.float32)}, "ShapeDtypeStruct at 'w'"),
    ],
)
def test_leaf_that_is_no_number_raises_an_error_with_the_line_that_keeps_it_out(state, found):
    engine = Engine(lambda state, batch: (state, {}))
    for call in (engine.run, engine.plan):
        with pytest.raises(TypeError, match=f"The state needs arrays and numbers as leaves, got .*{found}"):
            call(state, [0], epochs=1)


@pytest.mark.parametrize(
    ("state", "step", "advice"),
    [
        (0, lambda s, b: s + 0.5, r": int32\[\] became float32\[\]. Start it as a float, such as 1.0\.(\n|$)"),
        ({"n": 0}, lambda s, b: {"n": s["n"] * b}, r"n: int32\[\] became float32\[\]. Start n as a float, such as 1.0"),
        ({"n": np.int16(0)}, lambda s, b: {"n": 0}, r"Return n as int16: .astype\(jnp.int16\). Or start it as int32\."),
        (
            {"w": jnp.zeros(2, jnp.bfloat16)},
            lambda s, b: {"w": s["w"] * b},
            "Return w as bfloat16.* as float32",
        ),
        ({"n": 0}, lambda s, b: {"n": jnp.zeros(3)}, r"n: int32\[\] became float32\[3\]\.(\n|$)"),
    ],
)
def test_leaf_that_changes_its_dtype_raises_an_error_that_says_how_to_start_it(state, step, advice):
    with pytest.raises(ValueError, match=f"The step needs to return a state like the one it got: .*{advice}"):
        Engine(lambda s, b: (step(s, b), {})).run(state, [np.float32(1)], epochs=1)


HALF = jnp.ones(2, jnp.bfloat16)


def scan(state, batch):
    return {"n": jax.lax.scan(lambda n, x: (n + x, None), state["n"], jnp.ones(3))[0]}


def scale(state, batch):
    return state | {"w": state["w"] * state["rate"]}


@pytest.mark.parametrize(
    ("step", "state", "error", "names", "jit"),
    [
        pytest.param(scan, {"n": 0}, TypeError, "n (int32)", True, id="scan"),
        pytest.param(scale, {"w": HALF, "rate": 0.5}, ValueError, "rate (float32)", True, id="rate"),
        pytest.param(scale, {"w": HALF, "rate": 0.5}, ValueError, "rate (float32)", False, id="no jit"),
    ],
)
def test_error_that_a_python_number_in_the_state_causes_names_its_leaf(step, state, error, names, jit):
    with pytest.raises(error) as raised:
        Engine(lambda state, batch: (step(state, batch), {}), jit=jit).run(state, [0], epochs=1)
    assert any(f"Python numbers, which have no dtype, at {names}" in note for note in raised.value.__notes__)


def test_error_of_the_step_has_no_note_about_dtypes_if_it_is_not_about_them():
    def fail(state, batch):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as raised:
        Engine(fail).run({"n": 0}, [0], epochs=1)
    assert not any("dtype" in note for note in getattr(raised.value, "__notes__", ()))


def test_number_that_keeps_its_dtype_may_be_reset_with_a_bare_number():
    def count(state, batch):
        return {"n": jnp.where(batch > 1, 0, state["n"] + 1), "last": 0}, {}

    result = Engine(count).run({"n": 0, "last": 0}, [1, 1, 2, 1], epochs=1)
    assert (int(result.state["n"]), result.state["n"].dtype) == (1, jnp.int32)


@pytest.mark.parametrize("alias", [lambda key: key, jax.device_put], ids=["same array", "same memory"])
def test_key_that_is_also_in_a_donated_state_can_be_used(alias):
    def draw(state, batch, rng):
        return state | {"x": state["x"] + jax.random.normal(rng)}, {}

    def run(donate):
        key = jax.random.key(0)
        return Engine(draw).run({"key": alias(key), "x": jnp.float32(0)}, [0] * 3, epochs=1, rng=key, donate=donate)

    assert float(run(donate=True).state["x"]) == float(run(donate=False).state["x"])


def test_donated_state_and_key_are_named_when_they_are_used_again():
    state, key = {"w": jnp.ones(2)}, jax.random.key(0)
    engine = Engine(lambda state, batch: (jax.tree.map(lambda w: w + batch, state), {}))
    engine.run(state, [1.0], epochs=1, donate=True)
    with pytest.raises(ValueError, match="The state holds a deleted array at 'w'. It was donated to a compiled call"):
        engine.run(state, [1.0], epochs=1)
    key.delete()
    with pytest.raises(ValueError, match="rng is a deleted array. It was donated to a compiled call"):
        Engine(counting_step).run(0, [1], epochs=1, rng=key)
