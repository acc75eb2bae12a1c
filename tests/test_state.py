"""TrainState: an update compared with its closed form, compilation, runs; NNX and Equinox models without it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import nnx
from onstep import Engine
from onstep.callbacks import EMA, Checkpoint
from onstep.state import TrainState
from onstep.testing import same_bytes

X = np.random.default_rng(0).normal(1.0, 2.0, size=(8, 3)).astype(np.float32)
Y = X @ np.float32([[1.0], [-2.0], [0.5]]) + 3


class Net(nn.Module):
    """Optional batch norm, and dropout, before one linear layer."""

    norm: bool = True

    @nn.compact
    def __call__(self, x):
        if self.norm:
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))


NET, PLAIN, DENSE, SGD = Net(), Net(norm=False), nn.Dense(1), optax.sgd(0.125)


def step(state, batch):
    """One step for any Linen model."""

    def loss_fn(params):
        variables, rngs = {"params": params, "batch_stats": state.batch_stats}, {"dropout": state.step_rng()}
        out, updates = state.apply_fn(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updates), {"loss": loss}


def create(model=NET, kind=TrainState, **fields):
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    return kind.create(apply_fn=model.apply, tx=SGD, **variables, **{"rng": jax.random.key(2), **fields})


def counter(kind=TrainState, **fields):
    """Return a state with a single parameter."""
    return kind.create(apply_fn=None, params={"w": jnp.float32(1)}, tx=SGD, **fields)


BATCHES = [{"x": X, "y": Y}] * 6


def test_one_step_of_gradient_descent_agrees_with_its_closed_form():
    state = create(DENSE)
    kernel, bias = np.asarray(state.params["kernel"], np.float64), np.asarray(state.params["bias"], np.float64)
    new, metrics = step(state, {"x": X, "y": Y})
    residual = X @ kernel + bias - Y
    assert metrics["loss"] == pytest.approx(np.mean(residual**2), rel=1e-5)
    np.testing.assert_allclose(new.params["kernel"], kernel - 0.125 * 2 / len(X) * X.T @ residual, rtol=1e-5)
    np.testing.assert_allclose(new.params["bias"], bias - 0.125 * 2 * residual.mean(0), rtol=1e-5)


def test_an_update_increases_the_step_and_does_not_change_the_old_state():
    old = counter()
    new = old.apply_gradients(grads={"w": jnp.float32(4)}, metrics=7)
    assert (old.step, old.params, old.metrics) == (0, {"w": 1.0}, None)
    assert (new.step, new.params, new.metrics) == (1, {"w": 0.5}, 7)
    with pytest.raises(AttributeError, match="cannot assign to field 'step'"):
        new.step = 3


def test_gradients_and_changes_are_keyword_arguments():
    with pytest.raises(TypeError, match="positional argument"):
        counter().apply_gradients({"w": 1.0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchstats'"):
        counter().apply_gradients(grads={"w": 1.0}, batchstats={})


def test_a_jitted_step_compiles_once():
    jitted, state = jax.jit(lambda state: state.apply_gradients(grads=state.params)), counter()
    for _ in range(3):
        state = jitted(state)
    assert (jitted._cache_size(), state.step, state.step.dtype) == (1, 3, jnp.int32)


def test_an_engine_compiles_only_before_the_first_step():
    events = []

    def listen(name, seconds, **_):
        events.append(name)

    engine = Engine(step)
    engine.on("step_end")(lambda loop: events.append(loop.step))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine.run(create(), BATCHES, steps=5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" in events[: events.index(1)]
    assert events[events.index(1) : events.index(5) + 1] == [1, 2, 3, 4, 5]


def test_running_statistics_follow_the_batches():
    result = Engine(step).run(create(), BATCHES, steps=4)
    mean = result.state.batch_stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, (1 - 0.9**4) * X.mean(0), rtol=1e-5)


@pytest.mark.parametrize(("model", "collections"), [(NET, ["BatchNorm_0"]), (PLAIN, [])], ids=["with", "without"])
def test_one_step_works_for_models_with_and_without_running_statistics(model, collections):
    result = Engine(step).run(create(model), BATCHES, steps=2)
    assert list(result.state.batch_stats) == collections


def test_each_step_has_its_own_key_that_a_resumed_run_repeats():
    def draw(state, batch):
        return state.apply_gradients(grads={"w": 0.0}), {"drawn": jax.random.uniform(state.step_rng())}

    engine, key = Engine(draw, log_every=1), jax.random.key(5)
    whole = engine.run(counter(rng=key), range(6), epochs=1)
    first = engine.run(counter(rng=key), range(6), steps=2)
    second = engine.run(first, range(6), epochs=1)
    expected = [float(jax.random.uniform(jax.random.fold_in(key, n))) for n in range(6)]
    assert whole.history["train/drawn"] == expected
    assert first.history["train/drawn"] + second.history["train/drawn"] == expected
    assert len(set(expected)) == 6


def test_a_state_without_a_key_says_how_to_pass_one():
    with pytest.raises(
        ValueError, match=r"step_rng needs a random key. Pass one: TrainState.create\(..., rng=jax.random.key\(0\)\)"
    ):
        counter().step_rng()


def test_running_sums_are_kept_in_the_state():
    sums = metrics.Collection.create(loss=metrics.Average.from_output("loss"))

    def add(state, batch):
        new = sums.single_from_model_output(loss=batch)
        return state.apply_gradients(grads={"w": 0.0}, metrics=state.metrics.merge(new)), {}

    result = Engine(add).run(counter(metrics=sums.empty()), [1.0, 2.0, 6.0], epochs=1)
    assert result.state.metrics.compute() == {"loss": 3.0}


class WithTarget(TrainState):
    """A state with an additional field, which has no default."""

    target: Any


def test_a_subclass_adds_fields_that_a_step_updates():
    def follow(state, batch):
        state = state.apply_gradients(grads={"w": batch})
        return state.replace(target=state.params["w"]), {}

    with pytest.raises(TypeError, match="missing .* 'target'"):
        counter(WithTarget)
    result = Engine(follow).run(counter(WithTarget, target=jnp.float32(0)), [4.0, 4.0], epochs=1)
    assert (type(result.state), result.state.target, result.state.rng) == (WithTarget, 0.0, None)


def test_parameters_and_statistics_are_averaged():
    ema = EMA(0.5, of=("params", "batch_stats"))
    result = Engine(step, [ema]).run(create(), BATCHES, steps=1)
    averaged, start = ema.apply(result), create()
    for one, two, mean in zip(*map(jax.tree.leaves, (start.params, result.state.params, averaged.params)), strict=True):
        np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-6)
    np.testing.assert_allclose(averaged.batch_stats["BatchNorm_0"]["mean"], 0.05 * X.mean(0), rtol=1e-5)


def test_a_checkpoint_contains_the_whole_state(tmp_path):
    def run(state, steps, *callbacks):
        return Engine(step, [EMA(0.9), *callbacks]).run(state, BATCHES, steps=steps)

    extra = {"target": jnp.arange(3), "metrics": metrics.Average.empty()}
    whole = run(create(kind=WithTarget, **extra), 6)
    run(create(kind=WithTarget, **extra), 4, Checkpoint(tmp_path))
    other = create(kind=WithTarget, **extra, rng=jax.random.key(9))
    resumed = run(other.replace(params=jax.tree.map(jnp.zeros_like, other.params)), 6, Checkpoint(tmp_path))
    assert same_bytes(resumed.state, whole.state)


def test_an_nnx_model_is_split_once_and_merged_in_the_step():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.drop = nnx.BatchNorm(3, momentum=0.9, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(self.drop(self.norm(x)))

    def update(model, optimizer, batch):
        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def nnx_step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss = update(model, optimizer, batch)
        return nnx.state((model, optimizer)), {"loss": loss}

    result = Engine(nnx_step, log_every=1).run(state, BATCHES, steps=3)
    losses = [float(nnx.jit(update)(model, optimizer, batch)) for batch in BATCHES[:3]]
    trained, _ = nnx.merge(graph, result.state)
    np.testing.assert_allclose(result.history["train/loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(trained.norm.mean[...], (1 - 0.9**3) * X.mean(0), rtol=1e-5)


def test_the_arrays_of_an_equinox_model_can_be_the_state():
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)), eqx.is_array)

    def eqx_step(state, batch):
        def loss_fn(params):
            model = eqx.combine(params, static)
            return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = SGD.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}

    ema = EMA(0.9)
    state = {"params": params, "opt_state": SGD.init(params)}
    result = Engine(eqx_step, [ema], log_every=1).run(state, BATCHES * 5, epochs=1)
    losses = result.history["train/loss"]
    assert losses[-1] < losses[0] / 5
    assert eqx.combine(ema.params(result), static)(X[0]).shape == (1,)
