"""Fingerprint: any change of the state or of the batch changes a hash, in every mode, without changing the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import EMA, Fingerprint
from onstep.callbacks.fingerprint import _hash
from onstep.sharding import make_mesh
from onstep.testing import same_bytes

RANDOM = np.random.default_rng(1)
hashed = jax.jit(_hash)


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16", "uint4", "bool", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_type_changes_the_hash(dtype):
    raw = RANDOM.integers(0, {"bool": 2, "uint4": 16}.get(dtype, 256), (8, 8), dtype=np.uint8)
    hashes = [int(hashed(jnp.asarray(raw.view(jnp.dtype(dtype)))))]
    for position in range(0, 64, 7):
        other = raw.copy()
        other.flat[position] ^= 1
        hashes.append(int(hashed(jnp.asarray(other.view(jnp.dtype(dtype))))))
    assert len(set(hashes)) == len(hashes)


def test_every_bit_of_64_bits_and_of_keys_changes_the_hash():
    with jax.enable_x64(True):
        raw = RANDOM.integers(0, 256, 64, dtype=np.uint8)
        for dtype in ("float64", "int64", "complex128"):
            hashes = set()
            for position in (0, 3, 5, 7, 9, 13, 15, 63):
                other = raw.copy()
                other[position] ^= 128
                hashes.add(int(_hash(jnp.asarray(other.view(dtype)))))
            assert len(hashes) == 8
    keys = jax.random.split(jax.random.key(0), 3)
    assert int(hashed(keys)) != int(hashed(keys[::-1]))


def test_changes_that_could_cancel_change_the_hash():
    w = jnp.asarray(RANDOM.normal(size=(6, 4)), jnp.float32)
    trees = [
        {"a": w, "b": w + 1},
        {"a": -w, "b": w + 1},
        {"a": -w, "b": -w - 1},
        {"a": w.at[:2].multiply(-1), "b": w + 1},
        {"a": w + 1, "b": w},
        {"a": w[::-1], "b": w + 1},
        {"a": w[:, ::-1], "b": w + 1},
        {"a": w.at[0].set(w[1]).at[1].set(w[0]), "b": w + 1},
        {"a": w.at[0, 0].set(w[0, 1] + 1).at[0, 1].set(w[0, 0]), "b": w + 1},
        {"a": w.at[0, 0].set(w[0, 0] + 1), "b": w},
        {"a": jnp.zeros((0, 4)), "b": w},
        {"a": w, "b": jnp.zeros((0, 4))},
    ]
    assert len({int(_hash(tree)) for tree in trees}) == len(trees)
    assert int(_hash({})) == int(_hash({"a": jnp.zeros(0)})) == 0


def step(state, batch):
    return {"w": state["w"] * 0.9 + batch}, {"loss": state["w"].sum()}


DATA = [np.full(8, n, np.float32) for n in range(20)]


def test_hashes_are_those_of_due_steps_in_every_mode_and_the_run_is_the_same():
    plain = Engine(step, [EMA(0.9, of="w")], steps_per_call=1).run({"w": jnp.ones(8)}, DATA, epochs=1)
    for options in ({"steps_per_call": 1}, {"steps_per_call": 4}, {"jit": False}, {"mesh": make_mesh()}):
        prints, states = Fingerprint(3), {}
        engine = Engine(step, [EMA(0.9, of="w", when=2), prints], **options)
        engine.on("step_end")(lambda loop, states=states: states.update({loop.step: int(hashed(loop.state))}))
        result = engine.run({"w": jnp.ones(8)}, DATA, epochs=1)
        assert same_bytes(result.state, plain.state)
        kept = {name: values.tolist() for name, values in prints.get_state().items()}
        assert kept == {
            "fingerprint_steps": [3, 6, 9, 12, 15, 18],
            "state": [states[number] for number in (3, 6, 9, 12, 15, 18)],
            "batch": [int(hashed(DATA[number - 1])) for number in (3, 6, 9, 12, 15, 18)],
        }
