"""Target: the field that follows against its closed form, in every kind of state, and what the step reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from onstep import Callback, Engine, at
from onstep.callbacks import EMA, Target
from onstep.testing import same_bytes
from onstep.tools import named_leaves


def follow(state, batch):
    """The batch becomes the parameters; the metric is the target that the step reads."""
    return {**state, "params": batch}, {"seen": state["target"]}


def closed_form(rate, target, sources):
    """Return (1 - r)^n t_0 + r times the sum of (1 - r)^(n - i) s_i."""
    n = len(sources)
    return (1 - rate) ** n * target + rate * sum((1 - rate) ** (n - i) * s for i, s in enumerate(sources, 1))


def run(target, sources, start=0.0, **options):
    state = {"params": np.float32(0), "target": np.float32(start)}
    data = [np.float32(source) for source in sources]
    return Engine(follow, [target], log_every=1, **options).run(state, data, epochs=1)


def test_target_is_exact_for_numbers_that_floats_hold_exactly():
    assert run(Target(rate=0.5), [3, 1, 4, -1, 5], start=8).state["target"] == closed_form(0.5, 8, [3, 1, 4, -1, 5])


@pytest.mark.parametrize("rate", [0.005, 0.1, 0.9])
def test_target_matches_its_closed_form(rate):
    sources = np.random.default_rng(0).normal(size=33)
    got = float(run(Target(rate=rate), sources, start=2).state["target"])
    assert got == pytest.approx(closed_form(rate, 2, sources), rel=1e-5, abs=1e-6)


def test_one_move_matches_optax():
    new, old = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    engine = Engine(lambda state, batch: (state, {}), [Target(rate=0.05)])
    moved = engine.run({"params": new, "target": old}, [0], epochs=1).state["target"]
    np.testing.assert_allclose(moved, optax.incremental_update(new, old, 0.05), rtol=1e-6)


def test_target_equals_the_average_of_ema():
    ema, data = EMA(0.75), [np.float32(x) for x in (3, 1, 4, 1, 5)]
    state = {"params": np.float32(2), "target": np.float32(2)}
    result = Engine(follow, [Target(rate=0.25), ema]).run(state, data, epochs=1)
    assert result.state["target"] == ema.params(result)


def test_step_reads_the_target_of_the_previous_step():
    assert run(Target(rate=0.5), [8, 0, 4], start=4).history["train/seen"] == [4.0, 6.0, 3.0]


@pytest.mark.parametrize(
    ("when", "seen"),
    [
        pytest.param(2, [0, 0, 2, 2, 4], id="every 2 steps"),
        pytest.param(at(1) | 4, [0, 1, 1, 1, 4], id="at step 1 and every 4"),
    ],
)
def test_hard_copy_is_made_at_due_steps(when, seen):
    assert run(Target(rate=1, when=when), [1, 2, 3, 4, 5]).history["train/seen"] == seen


def test_hard_copy_replaces_a_target_that_is_not_finite():
    assert run(Target(rate=1), [3.0], start=np.inf).state["target"] == 3


@pytest.mark.parametrize(
    "target",
    [Target(rate=0.3), Target(rate=0.3, when=2), Target(rate=1, when=3)],
    ids=["soft", "every 2 steps", "hard"],
)
def test_resumed_run_ends_in_the_same_bytes(target):
    sources = list(np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32))
    state = {"params": np.zeros(9, np.float32), "target": np.ones(9, np.float32)}
    engine = Engine(lambda state, batch: ({**state, "params": batch + state["target"] / 3}, {}), [target])
    whole = engine.run(state, sources, steps=7).state
    parts = engine.run(engine.run(state, sources, steps=3), sources, steps=7).state
    assert same_bytes(parts, whole)
    assert not np.array_equal(whole["target"], state["target"])


@pytest.mark.parametrize("options", [{"jit": False}, {"steps_per_call": 4}], ids=["uncompiled", "in blocks"])
@pytest.mark.parametrize("when", [1, 2])
def test_target_is_the_same_in_every_execution_mode(options, when):
    sources = np.float32([3, 1, 4, 1, 5, 9]) / 7
    plain, other = (
        run(Target(rate=0.3, when=when), sources, **how).state["target"] for how in ({"steps_per_call": 1}, options)
    )
    assert plain == other


def test_fields_may_be_nested_and_have_any_name():
    state = {"critic": {"net": 1.0, "slow": 3.0}, "actor": 0.0}
    target = Target("critic.net", "critic.slow", rate=0.5)
    result = Engine(lambda state, batch: (state, {}), [target]).run(state, [0], epochs=1)
    assert result.state == {"critic": {"net": 1.0, "slow": 2.0}, "actor": 0.0}


class Named(NamedTuple):
    params: Any
    target: Any


class WithTarget(TrainState):
    target: Any = None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda a, b: {"params": a, "target": b}, id="dict"),
        pytest.param(lambda a, b: freeze({"params": a, "target": b}), id="FrozenDict"),
        pytest.param(Named, id="NamedTuple"),
        pytest.param(
            lambda a, b: WithTarget.create(apply_fn=None, params=a, tx=optax.identity(), target=b), id="TrainState"
        ),
        pytest.param(
            lambda a, b: nnx.State({"params": {"w": nnx.Param(a["w"])}, "target": {"w": nnx.Param(b["w"])}}), id="NNX"
        ),
    ],
)
def test_every_kind_of_state_works(make):
    state = make({"w": jnp.float32(4)}, {"w": jnp.float32(0)})
    result = Engine(lambda state, batch: (state, {}), [Target(rate=0.5)]).run(state, [0, 0], epochs=1)
    assert type(result.state) is type(state)
    numbers = {path.split("/")[0]: float(leaf) for path, leaf in named_leaves(result.state).items()}
    assert (numbers["params"], numbers["target"]) == (4.0, 3.0)


def test_leaves_that_are_not_floats_are_copied():
    def tree(seed, count):
        return {"w": jnp.float32(count), "count": jnp.int32(count), "key": jax.random.key(seed)}

    state = {"params": tree(1, 10), "target": tree(0, 0)}
    after = Engine(lambda state, batch: (state, {}), [Target(rate=0.5)]).run(state, [0], epochs=1).state["target"]
    assert (after["w"], after["count"], after["key"]) == (5.0, 10, jax.random.key(1))


def test_32_bit_target_keeps_moves_that_16_bits_would_lose():
    state = {"params": jnp.bfloat16(1.5), "target": jnp.float32(1)}
    after = Engine(lambda state, batch: (state, {}), [Target(rate=2**-10)]).run(state, [0], epochs=1).state["target"]
    assert (after, after.dtype) == (1 + 2**-11, jnp.float32)


@pytest.mark.parametrize("rate", [0.5, 1])
def test_16_bit_target_keeps_its_dtype(rate):
    state = {"params": jnp.float32(4), "target": jnp.bfloat16(4)}
    after = Engine(lambda state, batch: (state, {}), [Target(rate=rate)]).run(state, [0], epochs=1).state["target"]
    assert (after, after.dtype) == (4, jnp.bfloat16)


def test_hard_copy_shares_no_buffer_with_its_source():
    shared = []

    class Compare(Callback):
        def on_step_end(self, loop):
            shared.append(loop.state["params"].unsafe_buffer_pointer() == loop.state["target"].unsafe_buffer_pointer())

    state = {"params": np.zeros(100), "target": np.zeros(100)}
    Engine(lambda s, b: ({**s, "params": s["params"] + b}, {}), [Target(rate=1), Compare()]).run(
        state, [1] * 4, epochs=1
    )
    assert shared == [False] * 4


@pytest.mark.parametrize(
    ("params", "target", "message"),
    [
        pytest.param({"w": 1.0, "b": 2.0}, {"w": 1.0}, "to 'target', b: float32.. is gone", id="missing leaf"),
        pytest.param({"w": 1.0}, {"v": 1.0}, "w: float32.. is gone; v: float32.. is new", id="another name"),
        pytest.param(np.ones(3), np.ones((1, 3)), r"float32\[3\] became float32\[1,3\]", id="shape"),
        pytest.param({"w": 1}, {"w": 1.0}, r"w: int32\[\] became float32\[\]", id="dtype"),
        pytest.param({"w": 1.0}, freeze({"w": 1.0}), "the structure .* became", id="container"),
    ],
)
def test_target_that_differs_from_its_source_raises_when_the_run_starts(params, target, message):
    engine = Engine(lambda state, batch: (state, {}), [Target(when=at(100))])
    with pytest.raises(
        ValueError, match=f"Target needs 'target' to have the structure and shapes of 'params', but .*{message}"
    ):
        engine.run({"params": params, "target": target}, [0], epochs=1)


def test_unknown_field_raises_an_error_that_lists_the_fields():
    with pytest.raises(ValueError, match=r"Target needs 'target' in the state, but dict has \['params'\]"):
        Engine(lambda state, batch: (state, {}), [Target()]).run({"params": 1.0}, [0], epochs=1)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan"), "fast"])
def test_rate_out_of_range_raises(rate):
    with pytest.raises(ValueError, match=f"Target needs 0 < rate <= 1, got {rate!r}"):
        Target(rate=rate)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        pytest.param(Target(), "Target()", id="defaults"),
        pytest.param(
            Target("critic.net", "critic.slow", rate=1, when=1000),
            "Target(source='critic.net', target='critic.slow', rate=1, when=1000)",
            id="more",
        ),
    ],
)
def test_repr_reads_like_the_call(target, text):
    assert repr(target) == text
