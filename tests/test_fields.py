"""Fields of a state: paths of attributes, keys and indices, for every kind of state and every callback with `of`."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from onstep import Engine
from onstep.callbacks import EMA, SWA, ClipWeights, GradNorm, Histograms, LearningRate, NaNGuard, Summary, Target
from onstep.tools import get_carry, get_field, get_fields, set_field, set_fields


class Named(NamedTuple):
    params: dict
    count: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    params: dict
    count: int


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A node whose children JAX numbers, because it is registered without names."""

    def __init__(self, params, count):
        self.params, self.count = params, count

    @property
    def double(self):
        return 2 * self.count

    def tree_flatten(self):
        return (self.params, self.count), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Model(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.w = nnx.Param(jnp.ones(3))


def nnx_state():
    model = Model()
    return nnx.state((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))


W = np.float32([1, 2])
STATES = [
    pytest.param(lambda: {"params": {"w": W}, "count": 0}, "params.w", id="dict"),
    pytest.param(lambda: {"net": {"0.weight": W}, "count": 0}, "net.0.weight", id="key with a dot"),
    pytest.param(lambda: {0: {"w": W}, 1: 0}, "0.w", id="dict with integer keys"),
    pytest.param(lambda: freeze({"params": {"w": W}, "count": 0}), "params.w", id="FrozenDict"),
    pytest.param(lambda: ({"params": {"w": W}}, 0), "0.params.w", id="tuple"),
    pytest.param(lambda: [0, [0, W]], "1.1", id="list"),
    pytest.param(lambda: (0, W), 1, id="index"),
    pytest.param(lambda: Named({"w": W}, 0), "params.w", id="named tuple"),
    pytest.param(lambda: Registered({"w": W}, 0), "params.w", id="dataclass"),
    pytest.param(lambda: Unnamed({"w": W}, 0), "params.w", id="node without names, by attribute"),
    pytest.param(lambda: Unnamed({"w": W}, 0), "0.w", id="node without names, by index"),
    pytest.param(
        lambda: TrainState.create(apply_fn=None, params={"w": W}, tx=optax.adam(0.1)), "opt_state.0.mu", id="TrainState"
    ),
    pytest.param(nnx_state, "0.inner.kernel", id="NNX state of two modules"),
    pytest.param(nnx_state, "0.inner", id="module in an NNX state"),
    pytest.param(nnx_state, 0, id="first module of an NNX state"),
    pytest.param(Model, "inner.kernel", id="NNX module"),
    pytest.param(Model, "w", id="attribute of an NNX module"),
]


@pytest.mark.parametrize(("make", "path"), STATES)
def test_field_can_be_read_and_replaced_in_every_kind_of_state(make, path):
    state = make()
    before, part = jax.tree.leaves(state), get_field(state, path, "EMA")
    assert jax.tree.leaves(part)
    new = set_field(state, path, jax.tree.map(lambda leaf: leaf + 1, part))
    assert (type(new), jax.tree.structure(new)) == (type(state), jax.tree.structure(state))
    assert all(one is other for one, other in zip(before, jax.tree.leaves(state), strict=True))
    changed = [not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(new), strict=True)]
    assert sum(changed) == len(jax.tree.leaves(part))
    assert jax.tree.all(jax.tree.map(lambda old, got: np.array_equal(old + 1, got), part, get_field(new, path, "EMA")))


@pytest.mark.parametrize("make", [nnx_state, Model], ids=["NNX state", "NNX module"])
def test_averaged_nnx_model_has_the_type_that_flax_merges(make):
    def shift(state, batch):
        return jax.tree.map(lambda leaf: leaf + batch.astype(leaf.dtype), state), {}

    state, ema = make(), EMA(0.5, of=0 if make is nnx_state else "inner")
    result = Engine(shift, [ema]).run(state, [np.float32(2)], epochs=1)
    assert type(ema.params(result)) is type(get_fields(state, ema.of, "EMA"))
    assert jax.tree.structure(ema.apply(result)) == jax.tree.structure(result.state)
    kernel = "0.inner.kernel" if make is nnx_state else "inner.kernel"
    first, averaged = (get_field(tree, kernel, "EMA")[...] for tree in (state, ema.apply(result)))
    np.testing.assert_allclose(averaged, first + 1, rtol=1e-6)


def test_several_fields_are_read_and_replaced_together():
    state = ({"params": 1, "count": 2}, 3)
    assert get_fields(state, ("0.params", 1), "EMA") == (1, 3)
    assert set_fields(state, ("0.params", 1), (5, 7)) == ({"params": 5, "count": 2}, 7)


@pytest.mark.parametrize(
    ("state", "of", "message"),
    [
        pytest.param({"params": 1.0}, "parms", r"'parms' .* dict has \['params'\]. Did you mean params\?", id="typo"),
        pytest.param(({"params": 1.0}, 0), "params", r"tuple has \['0', '1'\]. Did you mean 0.params\?", id="nested"),
        pytest.param({"gen": {"w": 1.0}}, "gen.v.w", r"'gen.v.w' .* dict has \['w'\]. Did you mean gen.w\?", id="deep"),
        pytest.param((1.0, 2.0), 2, r"2 in the state, but tuple has \['0', '1'\]\.$", id="index"),
        pytest.param((1.0, 2.0), "count", r"tuple has \['0', '1'\]\.$", id="method of a tuple"),
        pytest.param({"gen": W}, "gen.T", r"'gen' is one array, float32\[2\]\.", id="attribute of an array"),
        pytest.param({"gen": {}}, "gen.w", r"'gen' is empty\.", id="empty field"),
        pytest.param(W, "params", r"the state is one array, float32\[2\]. Pass of=None", id="array"),
        pytest.param([W] * 30, "w", r"list has \['0', .*'19', '...'\]", id="long list"),
        pytest.param(nnx_state(), "inner", r"State has \['0', '1'\]. Did you mean 0.inner\?", id="NNX state"),
        pytest.param(Model(), "iner", r"Model has \['inner', 'w'\]. Did you mean inner\?", id="NNX module"),
        pytest.param({"w": 1.0}, ("w", 1.5), r"1.5 in the state", id="not a field"),
    ],
)
def test_unknown_field_raises_an_error_that_lists_the_fields_and_suggests_one(state, of, message):
    with pytest.raises(ValueError, match=f"EMA needs .*{message}"):
        get_fields(state, of, "EMA")


def test_property_can_be_read_but_not_replaced():
    state = Unnamed(1.0, 3)
    assert get_field(state, "double", "EMA") == 6
    with pytest.raises(ValueError, match="'double' cannot be replaced, because it is a property of Unnamed"):
        set_field(state, "double", 0)


def callbacks(of, directory):
    """Return every callback with `of`, in the order in which they can share one run."""
    return [
        EMA(0.5, of=of),
        SWA(start=0, of=of, when=1),
        GradNorm(updates=True, params=True, of=of),
        ClipWeights(-1, 1, of=of),
        Target(of, "1.target"),
        Histograms(directory, of=of, grads=True, when=1),
        Summary(of),
    ]


@pytest.mark.parametrize("of", ["0.params", "0"])
def test_every_callback_takes_a_path_with_an_index(of, tmp_path):
    def descend(state, batch):
        net, rest = state
        return ({"params": net["params"] - batch}, rest), {}, {"grads": get_field((net,), of, "test")}

    rate = LearningRate(optax.constant_schedule(0.5), of="1.opt")
    target = {"params": W} if of == "0" else W
    state = ({"params": W}, {"target": target, "opt": optax.sgd(optax.constant_schedule(0.5)).init(W)})
    ema, swa, norm, *rest = callbacks(of, tmp_path)
    result = Engine(descend, [ema, swa, norm, *rest, rate]).run(state, [np.float32([3, 4])], epochs=1)
    assert [jax.tree.leaves(cb.params(result))[0].tolist() for cb in (ema, swa)] == [[-0.5, 0.0], [-2.0, -2.0]]
    assert result.state[0]["params"].tolist() == [-1.0, -1.0]
    assert (result.latest["train/update_norm"], result.latest["lr"]) == (5.0, 0.5)


@pytest.mark.parametrize("number", range(6))
def test_every_compiled_half_checks_its_field_before_the_first_step_and_in_a_plan(number, tmp_path):
    callback = callbacks("0.params", tmp_path)[number]
    state = ({"weights": W}, {"target": W})
    engine = Engine(lambda state, batch: (state, {}, {"grads": W}), [callback])
    for call in (engine.plan, engine.run):
        with pytest.raises(ValueError, match=r"needs '0.params' in the state, but dict has \['weights'\]"):
            call(state, [0], epochs=1)


@pytest.mark.parametrize(
    "callback", [Summary("0.params"), LearningRate(of="0.params")], ids=["Summary", "LearningRate"]
)
def test_host_halves_check_their_field_before_the_first_step(callback):
    steps = []
    engine = Engine(lambda state, batch: (state, {}), [callback])
    engine.on("step_begin")(steps.append)
    with pytest.raises(ValueError, match=r"needs '0.params' in the state, but dict has \['weights'\]"):
        engine.run(({"weights": W}, 0), [0], epochs=1)
    assert not steps


@pytest.mark.parametrize(
    "read",
    [EMA().params, EMA().apply, SWA(start=1).params, SWA(start=1).apply, NaNGuard().skipped],
    ids=lambda read: read.__qualname__,
)
def test_asking_for_the_carry_of_a_state_raises_an_error_that_asks_for_the_loop_or_the_result(read):
    with pytest.raises(TypeError, match=r"(EMA|SWA|NaNGuard) needs the loop or the result of a run, got dict"):
        read({"params": W})


def test_carry_is_the_same_in_the_loop_and_in_the_result():
    ema, seen = EMA(0.5), []
    engine = Engine(lambda state, batch: (state, {}), [ema])
    engine.on("step_end")(lambda loop: seen.append(get_carry(loop, ema).average["params"] is not None))
    result = engine.run({"params": {"params": W}}, [0], epochs=1)
    assert seen == [True]
    assert get_carry(result, ema).average["params"].tolist() == [1.0, 2.0]
