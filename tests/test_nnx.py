"""Modules of Flax NNX as the state, and other containers that steps change in place."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import epoch
from onstep import Callback, Engine
from onstep.callbacks import EMA, SWA, Checkpoint, ClipWeights, Evaluate, GradNorm, NaNGuard
from onstep.testing import same_bytes

TX = optax.adam(1e-2)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)))


def fresh():
    model = Model(nnx.Rngs(0))
    return {"model": model, "optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param)}


def cross_entropy(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def step(state, batch):
    loss, grads = nnx.value_and_grad(cross_entropy)(state["model"], batch)
    state["optimizer"].update(state["model"], grads)
    return state, {"loss": loss}, {"grads": grads}


def score(state, batch):
    state["model"].eval()
    return {"loss": cross_entropy(state["model"], batch)}


def by_hand(steps):
    """Return the state after some steps of a loop by hand."""
    state = fresh()

    @nnx.jit
    def update(model, optimizer, batch):
        _, grads = nnx.value_and_grad(cross_entropy)(model, batch)
        optimizer.update(model, grads)

    batches = [batch for number in range(2) for batch in epoch(number)]
    for batch in batches[:steps]:
        update(state["model"], state["optimizer"], batch)
    return state


def run(*callbacks, state=None, step=step, epochs=2, **options):
    return Engine(step, callbacks, **options).run(state or fresh(), epoch, epochs=epochs)


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_a_run_with_modules_ends_like_a_loop_by_hand(steps_per_call):
    result, expected = run(steps_per_call=steps_per_call), by_hand(24)
    assert jax.tree.structure(result.state) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(result.state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert (one == other).all()


def test_the_given_modules_are_not_changed():
    state = fresh()
    run(state=state, epochs=1)
    assert same_bytes(state, fresh())


@pytest.mark.slow
def test_an_uncompiled_run_takes_the_same_steps_and_leaves_the_given_modules_alone():
    state = fresh()
    result = Engine(step, jit=False).run(state, epoch, steps=1)
    assert same_bytes(state, fresh())
    np.testing.assert_allclose(result.state["model"].out.kernel[...], by_hand(1)["model"].out.kernel[...], rtol=1e-3)


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_callbacks_see_the_state_before_and_after_a_step_that_works_in_place(steps_per_call):
    seen = run(GradNorm(updates=True, params=True, of="model.out"), EMA(0.5, of="model"), steps_per_call=steps_per_call)
    assert 0 < seen.history["epoch/update_norm"][-1] < 1
    assert seen.history["epoch/grad_norm"][-1] > 0


@pytest.mark.parametrize("options", [{"steps_per_call": 1}, pytest.param({"jit": False}, marks=pytest.mark.slow)])
def test_an_undone_step_leaves_modules_optimizer_statistics_and_keys_unchanged(options):
    good = next(epoch(0))
    guard = NaNGuard(skip=True)
    result = Engine(step, [guard], **options).run(fresh(), [{**good, "x": good["x"] * np.nan}], epochs=1)
    assert guard.skipped(result) == 1
    assert same_bytes(result.state, fresh())


def test_weights_of_a_module_are_clipped():
    model = run(ClipWeights(-0.01, 0.01, of="model")).state["model"]
    assert abs(model.out.kernel[...]).max() <= 0.01


def test_averages_of_a_module_are_modules():
    ema, swa = EMA(0.5, of="model"), SWA(start=13, of="model", when=1)
    result = run(ema, swa)
    for average in (ema.apply(result), swa.apply(result)):
        assert isinstance(average["model"], Model)
        assert np.isfinite(score(average, next(epoch(0)))["loss"])
    assert not same_bytes(ema.params(result), result.state["model"])


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_a_resumed_run_with_modules_ends_in_the_same_bytes(steps_per_call, tmp_path):
    def train(directory, steps):
        callbacks = [NaNGuard(skip=True), EMA(0.9, of="model"), Checkpoint(directory, when=7)]
        return Engine(step, callbacks, steps_per_call=steps_per_call).run(fresh(), epoch, steps=steps)

    whole = train(tmp_path / "whole", 20)
    train(tmp_path / "resumed", 9)
    resumed = train(tmp_path / "resumed", 20)
    assert same_bytes((resumed.state, resumed.snapshot.tree["carries"]), (whole.state, whole.snapshot.tree["carries"]))


def test_evaluating_and_looking_at_modules_does_not_change_the_run():
    def look(loop):
        model = loop.state["model"]
        model.eval()
        model(next(epoch(0))["x"])
        loop.state["model"].drop.rngs.count[...] += 1

    engine = Engine(step, [Evaluate(score, list(epoch(0)), when=5)])
    engine.on("step_end", when=3)(look)
    watched, plain = engine.run(fresh(), epoch, epochs=2), run()
    assert same_bytes(watched.state, plain.state)
    assert len(watched.history["val/loss"]) == 4
    assert watched.history["val/loss"][-1] < watched.history["val/loss"][0]


def test_a_state_from_nnx_split_works_as_well():
    graph, arrays = nnx.split((fresh()["model"], fresh()["optimizer"]))

    def merged(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(cross_entropy)(model, batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), {"loss": loss}

    result = run(state=arrays, step=merged)
    np.testing.assert_allclose(
        nnx.merge(graph, result.state)[0].out.kernel[...], run().state["model"].out.kernel[...], rtol=1e-5
    )


def test_an_optimizer_outside_of_the_state_is_an_error_that_says_where_to_put_it():
    state = fresh()
    optimizer = state["optimizer"]

    def outside(model, batch):
        loss, grads = nnx.value_and_grad(cross_entropy)(model, batch)
        optimizer.update(model, grads)
        return model, {"loss": loss}

    with pytest.raises(Exception, match="different trace level") as caught:
        run(state=state["model"], step=outside)
    assert 'engine.run({"model": model, "optimizer": optimizer}, ...)' in caught.value.__notes__[1]


def test_tied_weights_in_a_module_are_an_error_that_says_what_to_do():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    tied = {"encoder": model, "decoder": model}
    message = r"one NNX Param at 'decoder/layers/0/bias' and 'encoder/layers/0/bias', .* nnx.split\(model\)"
    with pytest.raises(ValueError, match=message):
        Engine(lambda state, batch: (state, {})).run(tied, [1], epochs=1)


# In-place changes of other containers


def descend(state, batch):
    state["params"] = state["params"] - 0.5 * batch.pop("grads")
    return state, {"loss": state["params"]}, {"grads": state["params"]}


def data(*values):
    return [{"grads": np.float32(value)} for value in values]


MODES = [{"steps_per_call": 1}, {"steps_per_call": 4}, {"jit": False}]


@pytest.mark.parametrize("options", MODES)
def test_a_step_that_changes_dicts_in_place_is_measured_and_undone(options):
    batches, state = data(2, np.nan, 4), {"params": jnp.float32(0)}
    callbacks = [NaNGuard(skip=True), GradNorm(updates=True)]
    result = Engine(descend, callbacks, log_every=1, **options).run(state, batches, epochs=1)
    assert result.state == {"params": -3.0}
    assert result.history["train/update_norm"] == [1.0, 0.0, 2.0]
    assert (state, [*batches[0]]) == ({"params": 0.0}, ["grads"])


@pytest.mark.parametrize("options", MODES)
def test_a_dtype_that_is_changed_in_place_is_noticed(options):
    def narrow(state, batch):
        state["params"] = state["params"].astype(jnp.float16)
        return state, {}

    with pytest.raises(ValueError, match=r"params: float32\[\] became float16\[\]"):
        Engine(narrow, **options).run({"params": jnp.float32(0)}, [1], epochs=1)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("when", [1, 2])
def test_compiled_halves_may_change_what_they_get_in_place(options, when):
    class InPlace(Callback):
        update_when = when

        def init(self, state):
            state["params"] = jnp.zeros(3)
            return {"n": jnp.int32(0)}

        def update(self, carry, ctx):
            carry["n"] += 1
            for tree in (ctx.before, ctx.batch, ctx.aux):
                tree.clear()
            ctx.state["params"] += 100
            ctx.metrics["loss"] = jnp.float32(7)
            return carry, ctx.log(again=carry["n"])

    class Reads(Callback):
        def init(self, state):
            return state["params"]

        def update(self, carry, ctx):
            return carry, ctx.log(before=ctx.before["params"], batch=ctx.batch["grads"], aux=ctx.aux["grads"])

    first = InPlace()
    result = Engine(descend, [first, Reads()], log_every=1, **options).run({"params": 0.0}, data(2, 4), epochs=1)
    assert result.state["params"] == -3.0 + 200 / when
    assert result.carry(first) == {"n": 2 // when}
    assert result.history["train/batch"] == [2.0, 4.0]
    assert result.history["train/before"] == [0.0, 99.0 if when == 1 else -1.0]
    assert result.history["train/loss"] == [7.0 if when == 1 else -1.0, 7.0]


@pytest.mark.parametrize("jit", [contextlib.nullcontext, jax.disable_jit], ids=["compiled", "uncompiled"])
def test_an_evaluation_step_may_change_what_it_gets_in_place(jit):
    def pop(state, batch):
        state["params"] = state.pop("params") + 1
        return {"loss": state["params"] * batch.pop("grads")}

    state, batches = {"params": jnp.float32(1)}, data(1, 3)
    engine = Engine(lambda state, batch: (state, {}), [Evaluate(pop, batches)])
    with jit():
        history = engine.run(state, [1, 2], epochs=2, epoch_steps=1).history
    assert history["val/loss"] == [4.0, 4.0]
    assert (state, [*batches[0]]) == ({"params": 1.0}, ["grads"])
