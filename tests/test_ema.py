"""EMA: the average against its closed form, the fields that it covers, and how it is stored and resumed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from onstep import Callback, Engine, at, evaluate, every
from onstep.callbacks import EMA, Checkpoint
from onstep.callbacks.ema import EmaCarry, EmaWarmupCarry
from onstep.testing import same_bytes
from onstep.tools import signature


def follow(state, batch):
    """The batch becomes the parameters."""
    return {**state, "params": batch}, {}


def grow(state, batch):
    """Every leaf grows by the batch."""
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(batch, leaf.dtype), state), {}


def closed_form(decay, points):
    """Return the average of points p_0 ... p_n: d^n p_0 + (1 - d) times the sum of d^(n - i) p_i."""
    n = len(points) - 1
    return decay**n * points[0] + (1 - decay) * sum(decay ** (n - i) * points[i] for i in range(1, n + 1))


def average(ema, points, **options):
    """Return the average after a run whose parameters take these values; the first is the initial one."""
    data = [np.float32(point) for point in points[1:]]
    result = Engine(follow, [ema], **options).run({"params": np.float32(points[0])}, data, epochs=1)
    return float(ema.params(result))


class Averages(Callback):
    """Collects the average after each step."""

    def __init__(self, ema):
        self.ema, self.seen = ema, []

    def on_step_end(self, loop):
        self.seen.append(float(self.ema.params(loop)))


def averages(ema, points):
    """Return the averages after each step of such a run."""
    noted = Averages(ema)
    data = [np.float32(point) for point in points[1:]]
    Engine(follow, [ema, noted]).run({"params": np.float32(points[0])}, data, epochs=1)
    return noted.seen


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_average_is_exact_for_numbers_that_floats_hold_exactly(decay):
    points = [3, 1, 4, -1, 5, 9, 2, -6]
    assert average(EMA(decay), points) == closed_form(decay, points)


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.99, 0.999])
def test_average_matches_its_closed_form(decay):
    points = np.random.default_rng(0).normal(size=33)
    assert average(EMA(decay), points) == pytest.approx(closed_form(decay, points), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        pytest.param(1, 4.0625, id="every step"),
        pytest.param(2, 3.5, id="every 2 steps"),
        pytest.param(every(2) | at(3), 4.0, id="every 2 steps and at step 3"),
        pytest.param(every(epochs=1), 3.0, id="every epoch"),
        pytest.param(at(9), 1.0, id="never in this run"),
    ],
)
def test_average_is_updated_at_due_steps(when, expected):
    assert average(EMA(0.5, when=when), [1, 2, 3, 4, 5]) == expected


def test_average_starts_as_the_first_parameters():
    seen = []
    ema = EMA(0.9)
    engine = Engine(follow, [ema])
    engine.on("run_begin")(lambda loop: seen.append(float(ema.params(loop))))
    engine.run({"params": np.float32(7)}, [np.float32(1)], epochs=1)
    assert seen == [7.0]


def test_half_life_can_be_given_as_a_decay():
    half_life, points = 10, [1.0] + [0.0] * 10
    assert average(EMA(2 ** (-1 / half_life)), points) == pytest.approx(0.5, rel=1e-5)
    assert averages(EMA(2 ** (-1 / half_life)), points)[0] == pytest.approx(0.933, abs=5e-4)


@pytest.mark.parametrize("start", [1, 2, 5])
def test_average_equals_the_parameters_until_start(start):
    points = [8, 3, 1, 4, 1, 5]
    seen = averages(EMA(0.5, start=start), points)
    assert seen[:start] == points[1 : start + 1]
    assert seen[-1] == closed_form(0.5, points[start:])


def test_warmup_forgets_the_first_parameters_early():
    points, expected = [100, 1, 2, 3, 4, 5], 100.0
    seen = averages(EMA(0.6, warmup=3), points)
    for n, point in enumerate(points[1:], 1):
        decay = min(0.6, n / (n + 3))
        expected = decay * expected + (1 - decay) * point
        assert seen[n - 1] == pytest.approx(expected, rel=1e-6)


def test_warmup_counts_updates_and_not_steps():
    seen = averages(EMA(0.9, warmup=1, when=2), [8, 8, 0, 0, 0])
    assert seen == pytest.approx([8, 4, 4, 8 / 3])


def test_warmup_begins_at_start():
    seen = averages(EMA(0.9, warmup=1, start=2), [5, 3, 8, 0, 0])
    assert seen == pytest.approx([3, 8, 4, 8 / 3])


def test_custom_name_does_not_change_warmup():
    points = [9, 1, 2, 3]
    assert averages(EMA(0.9, warmup=2, name="slow"), points) == averages(EMA(0.9, warmup=2), points)


def test_nested_field_is_averaged_and_nothing_else():
    ema = EMA(0.5, of="gen.params")
    state = {"gen": {"params": {"w": jnp.float32(0)}, "count": 0}, "disc": {"params": jnp.float32(1)}}
    result = Engine(grow, [ema]).run(state, [2], epochs=1)
    assert ema.params(result) == {"w": 1.0}
    assert ema.apply(result) == {"gen": {"params": {"w": 1.0}, "count": 2}, "disc": {"params": 3.0}}


def test_several_fields_are_averaged():
    ema = EMA(0.5, of=("gen.params", "disc"))
    state = {"gen": {"params": jnp.float32(0)}, "disc": jnp.float32(10), "step": 0}
    result = Engine(grow, [ema]).run(state, [2, 2], epochs=1)
    assert ema.params(result) == (2.5, 12.5)
    assert ema.apply(result) == {"gen": {"params": 2.5}, "disc": 12.5, "step": 4}


def test_none_averages_the_floats_of_the_whole_state_and_copies_the_rest():
    ema = EMA(0.5, of=None)
    state = {"w": jnp.float32(1), "mean": jnp.float32(1), "count": jnp.int32(0), "on": jnp.array(False)}
    result = Engine(grow, [ema]).run(state, [1] * 4, epochs=1)
    assert ema.apply(result) == {"w": 4.0625, "mean": 4.0625, "count": 4, "on": True}
    assert ema.apply(result)["count"].dtype == jnp.int32


def test_random_key_in_the_state_is_copied():
    def draw(state, batch):
        key, _ = jax.random.split(state["key"])
        return {"w": state["w"] + batch, "key": key}, {}

    ema = EMA(0.5, of=None)
    result = Engine(draw, [ema]).run({"w": jnp.float32(0), "key": jax.random.key(0)}, [2.0], epochs=1)
    averaged = ema.apply(result)
    assert averaged["w"] == 1.0
    assert jnp.all(jax.random.key_data(averaged["key"]) == jax.random.key_data(result.state["key"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_floats_are_averaged_in_32_bits_and_returned_in_16(dtype):
    ema = EMA(0.99)
    next_to_one = jnp.asarray(1 + jnp.finfo(dtype).eps, dtype)  # in numpy 2.0 the sum is float32
    points = [jnp.asarray(1, dtype)] + [next_to_one] * 10
    result = Engine(follow, [ema]).run({"params": points[0]}, points[1:], epochs=1)
    kept = result.carry(ema).average
    assert (kept.dtype, ema.params(result).dtype) == (jnp.float32, dtype)
    assert float(kept) == pytest.approx(1 + (1 - 0.99**10) * float(jnp.finfo(dtype).eps), rel=1e-6)


def test_two_averages_of_one_run_are_independent():
    fast, slow = EMA(0.5), EMA(0.75)
    result = Engine(grow, [fast, slow]).run({"params": jnp.float32(0)}, [4, 4], epochs=1)
    assert (fast.params(result), slow.params(result)) == (closed_form(0.5, [0, 4, 8]), closed_form(0.75, [0, 4, 8]))
    assert list(result.snapshot.tree["carries"]) == ["EMA", "EMA_2"]


def test_order_of_the_callbacks_decides_what_is_averaged():
    class Double(Callback):
        def update(self, carry, ctx):
            return carry, ctx.replace(state={"params": 2 * ctx.state["params"]})

    before, after = EMA(0.0, name="before"), EMA(0.0, name="after")
    result = Engine(grow, [before, Double(), after]).run({"params": jnp.float32(1)}, [2], epochs=1)
    assert (before.params(result), after.params(result), result.state["params"]) == (3.0, 6.0, 6.0)


def test_average_does_not_change_the_run():
    state, data = {"params": jnp.arange(4.0) / 7, "count": 0}, [0.1, 0.2, 0.3]
    ema = EMA(0.9)

    class Look(Callback):
        def on_step_end(self, loop):
            ema.apply(loop)

    plain = Engine(grow).run(state, data, epochs=1)
    averaged = Engine(grow, [ema, Look()]).run(state, data, epochs=1)
    assert np.array_equal(plain.state["params"], averaged.state["params"])
    assert averaged.state["count"] == plain.state["count"]


def test_average_read_in_an_event_equals_that_of_the_result():
    ema = EMA(0.9)
    noted = Averages(ema)
    result = Engine(follow, [noted, ema]).run({"params": np.float32(1)}, [np.float32(5), np.float32(7)], epochs=1)
    assert noted.seen[-1] == float(ema.params(result))


def test_snapshot_holds_the_average_beside_the_state():
    saved = []
    ema = EMA(0.5)
    engine = Engine(grow, [ema])

    @engine.on("save")
    def save(loop):
        ema.apply(loop)
        tree = loop.snapshot().tree
        saved.append((float(tree["state"]["params"]), float(tree["carries"]["EMA"].average)))

    engine.run({"params": jnp.float32(1)}, [1, 1], epochs=1)
    assert saved == [(2.0, 1.5), (3.0, 2.25)]


def test_resumed_run_continues_the_average():
    points = [3, 1, 4, 1, 5, 9]
    data = [np.float32(point) for point in points[1:]]
    ema = EMA(0.5, warmup=2, when=2)
    engine = Engine(follow, [ema])
    whole = float(ema.params(engine.run({"params": np.float32(3)}, data, steps=5)))
    first = engine.run({"params": np.float32(3)}, data, steps=3)
    middle = float(ema.params(first))
    assert float(ema.params(engine.run(first, data, steps=5))) == whole
    assert float(ema.params(first)) == middle


def test_average_without_jit_is_the_same():
    points = [3, 1, 4, -1, 5]
    assert average(EMA(0.5, when=2), points, jit=False) == average(EMA(0.5, when=2), points)


@pytest.mark.parametrize(
    "ema",
    [
        pytest.param(EMA(0.0, of=None), id="no decay"),
        pytest.param(EMA(0.9, of=None, start=100), id="before start"),
        pytest.param(EMA(0.9, of=None, when=2), id="every 2 steps"),
        pytest.param(EMA(0.9, of=None, warmup=3), id="warmup"),
    ],
)
def test_average_shares_no_buffer_with_the_state(ema):
    shared = []

    class Compare(Callback):
        def on_run_begin(self, loop):
            state, carry = jax.tree.leaves(loop.state), jax.tree.leaves(loop.carries)
            shared.append({x.unsafe_buffer_pointer() for x in state} & {x.unsafe_buffer_pointer() for x in carry})

        on_step_end = on_run_begin

    Engine(grow, [ema, Compare()]).run({"w": jnp.ones(100), "count": jnp.arange(100)}, [1] * 6, epochs=1)
    assert shared == [set()] * 7


class Named(NamedTuple):
    params: dict
    count: int


def make_train_state(w):
    return TrainState.create(apply_fn=None, params={"w": w}, tx=optax.sgd(0.5))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda w: {"params": {"w": w}, "count": 0}, id="dict"),
        pytest.param(lambda w: freeze({"params": {"w": w}, "count": 0}), id="FrozenDict"),
        pytest.param(lambda w: Named({"w": w}, 0), id="NamedTuple"),
        pytest.param(lambda w: make_train_state(w), id="TrainState"),
        pytest.param(lambda w: nnx.State({"params": {"w": nnx.Param(w)}, "count": nnx.Variable(0)}), id="NNX State"),
    ],
)
def test_apply_returns_the_same_kind_of_state(make):
    ema = EMA(0.5)
    state = make(jnp.float32(0))
    result = Engine(grow, [ema]).run(state, [2], epochs=1)
    averaged = ema.apply(result)
    assert type(averaged) is type(state)
    assert jax.tree.structure(averaged) == jax.tree.structure(result.state)
    assert sorted(map(float, jax.tree.leaves(averaged))) == [1.0, 2.0]
    assert jax.tree.leaves(result.state) == [2, 2]


def test_params_of_a_train_state_are_averaged():
    def descend(state, batch):
        return state.apply_gradients(grads={"w": batch}), {}

    ema = EMA(0.5)
    result = Engine(descend, [ema]).run(make_train_state(jnp.float32(0)), [np.float32(-2), np.float32(-4)], epochs=1)
    averaged = ema.apply(result)
    assert (result.state.params, averaged.params) == ({"w": 3.0}, {"w": closed_form(0.5, [0, 1, 3])})
    assert (averaged.step, averaged.tx) == (2, result.state.tx)


def test_averaged_nnx_model_can_be_merged_and_called():
    graph, state = nnx.split(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
    state = jax.tree.map(jnp.zeros_like, state)
    whole, kernel = EMA(0.5, of=None), EMA(0.5, of="kernel")
    result = Engine(grow, [whole, kernel]).run(state, [2], epochs=1)
    for ema in (whole, kernel):
        model = nnx.merge(graph, ema.apply(result))
        assert model(jnp.ones((1, 2))) == 2.0
    assert nnx.merge(graph, result.state)(jnp.ones((1, 2))) == 4.0


def test_layers_of_an_nnx_model_are_fields():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(1, 1, use_bias=False, rngs=rngs)
            self.outer = nnx.Linear(1, 1, use_bias=False, rngs=rngs)

    _, model = nnx.split(Model(nnx.Rngs(0)))
    ema = EMA(0.5, of="model.inner.kernel")
    result = Engine(grow, [ema]).run({"model": jax.tree.map(jnp.zeros_like, model)}, [2], epochs=1)
    averaged = ema.apply(result)["model"]
    assert (averaged.inner.kernel[...], averaged.outer.kernel[...]) == (1.0, 2.0)


def test_averaged_state_can_be_evaluated_after_the_run():
    ema = EMA(0.5)
    result = Engine(grow, [ema]).run({"params": jnp.float32(0)}, [2], epochs=1)
    value = functools.partial(evaluate, lambda state, batch: {"w": state["params"]}, data=[1])
    assert (value(state=ema.apply(result)), value(state=result.state)) == ({"w": 1.0}, {"w": 2.0})


@pytest.mark.parametrize(
    ("state", "of", "message"),
    [
        pytest.param({"weights": 1.0, "step": 0}, "params", r"'params' .* dict has \['step', 'weights'\]", id="dict"),
        pytest.param(Named({"w": 1.0}, 0), "gen", r"'gen' .* Named has \['params', 'count'\]", id="NamedTuple"),
        pytest.param({"gen": {"w": 1.0}}, "gen.params", r"'gen.params' .* dict has \['w'\]", id="nested"),
        pytest.param({"gen": {"w": 1.0}}, ("gen", "disc"), r"'disc' .* dict has \['gen'\]", id="one of several"),
        pytest.param(make_train_state(1.0), "ema", r"'ema' .* TrainState has \['step', .*'params'", id="TrainState"),
    ],
)
def test_unknown_field_raises_an_error_that_lists_the_fields(state, of, message):
    with pytest.raises(ValueError, match=f"EMA needs {message}"):
        Engine(grow, [EMA(of=of)]).run(state, [1], epochs=1)


def test_asking_for_the_average_of_another_run_raises():
    result = Engine(grow, [EMA(name="fast")]).run({"params": 1.0}, [1], epochs=1)
    with pytest.raises(ValueError, match=r"This EMA is not among the run's callbacks \['fast'\]"):
        EMA().params(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"decay": 1.0}, "0 <= decay < 1, got 1.0", id="decay 1"),
        pytest.param({"decay": 2}, "0 <= decay < 1, got 2", id="decay 2"),
        pytest.param({"decay": -1}, "0 <= decay < 1, got -1", id="negative decay"),
        pytest.param({"decay": float("nan")}, "0 <= decay < 1, got nan", id="NaN decay"),
        pytest.param({"warmup": -1}, "warmup to be a whole number >= 0.* got -1", id="negative warmup"),
        pytest.param({"warmup": 0.5}, "warmup to be a whole number >= 0.* got 0.5", id="fractional warmup"),
        pytest.param({"start": -1}, "start to be a whole number >= 0.* got -1", id="negative start"),
        pytest.param({"start": 1.5}, "start to be a whole number >= 0.* got 1.5", id="fractional start"),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=f"EMA needs {message}"):
        EMA(**arguments)


@pytest.mark.parametrize(("warmup", "more"), [(0, {}), (3, {"updates": "int32[]"})], ids=["plain", "warmup"])
def test_carry_has_the_leaves_of_version_0_1(warmup, more):
    ema = EMA(warmup=warmup)
    result = Engine(grow, [ema]).run({"params": {"w": jnp.zeros(3, jnp.bfloat16)}}, [1], epochs=1)
    assert signature(result.carry(ema)) == {"average/w": "float32[3]", **more}


class DictEMA(EMA):
    """Keeps its carry in a dict, as version 0.1 did."""

    def init(self, state):
        return super().init(state)._asdict()

    def update(self, carry, ctx):
        carry, ctx = super().update((EmaWarmupCarry if self.warmup else EmaCarry)(**carry), ctx)
        return carry._asdict(), ctx


@pytest.mark.parametrize("warmup", [0, 3])
def test_checkpoint_of_version_0_1_resumes_to_the_same_bytes(warmup, tmp_path):
    def run(ema, steps, *callbacks):
        state, data = {"params": {"w": jnp.float32([1, 2])}}, [0.1, 0.2, 0.3, 0.4]
        return Engine(grow, [ema, *callbacks]).run(state, data, steps=steps)

    def ema(kind):
        return kind(0.9, warmup=warmup, name="EMA")

    whole = run(ema(EMA), 4)
    run(ema(DictEMA), 2, Checkpoint(tmp_path, when=2))
    resumed = run(ema(EMA), 4, Checkpoint(tmp_path, when=2))
    assert same_bytes(resumed.state, whole.state)
    assert same_bytes(resumed.snapshot.tree["carries"], whole.snapshot.tree["carries"])


@pytest.mark.parametrize(
    ("ema", "text"),
    [
        pytest.param(EMA(), "EMA()", id="defaults"),
        pytest.param(EMA(0.9), "EMA(decay=0.9)", id="decay"),
        pytest.param(
            EMA(of=("gen.params", "disc"), warmup=9, when=every(epochs=1), name="slow"),
            "EMA(of=('gen.params', 'disc'), warmup=9, when=every(epochs=1), name='slow')",
            id="all",
        ),
    ],
)
def test_repr_reads_like_the_call(ema, text):
    assert repr(ema) == text
