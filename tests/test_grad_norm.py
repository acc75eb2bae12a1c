"""GradNorm: norms of gradients, updates and parameters against numpy and optax, and when they are logged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from onstep import Callback, Engine, at, every
from onstep.callbacks import GradNorm


def descend(state, batch):
    """The batch is the gradient."""
    params = jax.tree.map(lambda param, grad: param - grad, state["params"], batch)
    return {**state, "params": params}, {}, {"grads": batch}


def run(grad_norm, grads, params=None, **options):
    """Run steps with these gradients; the parameters are zeros by default."""
    params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
    return Engine(descend, [grad_norm], log_every=1, **options).run({"params": params}, grads, epochs=1)


def history(result):
    """Return the training metrics of every step."""
    return {name: values for name, values in result.history.items() if name.startswith("train/")}


class Present(Callback):
    """Collects the steps whose metrics hold a norm."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, loop):
        if "grad_norm" in loop.metrics:
            self.steps.append(loop.step)


def test_norm_covers_all_gradients_together():
    grads = [{"w": np.float32([3, 0]), "b": np.float32(4)}, {"w": np.float32([6, 0]), "b": np.float32(8)}]
    assert history(run(GradNorm(), grads)) == {"train/grad_norm": [5.0, 10.0]}


def test_norm_matches_numpy_and_optax():
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(7, 3)).astype(np.float32), "b": [rng.normal(size=5).astype(np.float32)]}
    (got,) = run(GradNorm(), [grads]).history["train/grad_norm"]
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
    assert got == pytest.approx(float(np.linalg.norm(flat)), rel=1e-6)
    assert got == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)


def test_by_module_logs_a_norm_for_each_network():
    grads = {"gen": {"w": np.float32([3, 4])}, "disc": {"w": np.float32(0), "b": np.float32(12)}}
    assert history(run(GradNorm(by_module=True), [grads])) == {
        "train/grad_norm": [13.0],
        "train/grad_norm/gen": [5.0],
        "train/grad_norm/disc": [12.0],
    }


def test_by_module_looks_below_a_single_top_level_entry():
    grads = {"params": {"dense": {"w": np.float32(3)}, "head": {"w": np.float32(4)}}}
    assert history(run(GradNorm(by_module=True), [grads])) == {
        "train/grad_norm": [5.0],
        "train/grad_norm/dense": [3.0],
        "train/grad_norm/head": [4.0],
    }


def test_by_module_numbers_the_entries_of_a_tuple():
    result = run(GradNorm(by_module=True), [(np.float32(3), np.float32(4))])
    assert (result.latest["train/grad_norm/0"], result.latest["train/grad_norm/1"]) == (3.0, 4.0)


def test_by_module_adds_nothing_if_the_gradients_are_one_array():
    assert history(run(GradNorm(by_module=True), [np.float32([3, 4])])) == {"train/grad_norm": [5.0]}


def test_update_norm_is_the_norm_of_the_change_of_the_parameters():
    def half(state, batch):
        return {"params": state["params"] - 0.5 * batch}, {}, {"grads": batch}

    engine = Engine(half, [GradNorm(updates=True)], log_every=1)
    result = engine.run({"params": jnp.float32([1, 1])}, [np.float32([6, 8])], epochs=1)
    assert history(result) == {"train/grad_norm": [10.0], "train/update_norm": [5.0]}


def test_param_norm_is_taken_after_the_step():
    result = run(GradNorm(params=True), [np.float32([-3, -4])] * 2)
    assert history(result) == {"train/grad_norm": [5.0, 5.0], "train/param_norm": [5.0, 10.0]}


def test_all_norms_work_with_a_train_state():
    def train(state, batch):
        return state.apply_gradients(grads=batch), {"loss": jnp.float32(0)}, {"grads": batch}

    state = TrainState.create(apply_fn=None, params={"w": jnp.float32([0, 0])}, tx=optax.sgd(0.5))
    engine = Engine(train, [GradNorm(updates=True, params=True)])
    latest = engine.run(state, [{"w": np.float32([-6, -8])}] * 2, epochs=1).latest
    assert [latest[f"train/{name}"] for name in ("loss", "grad_norm", "update_norm", "param_norm")] == [0, 10, 5, 7.5]


def test_of_names_the_field_with_the_parameters():
    def train(state, batch):
        return {"gen": {"weights": state["gen"]["weights"] + 2 * batch}}, {}, {"grads": batch}

    engine = Engine(train, [GradNorm(updates=True, params=True, of="gen.weights")])
    latest = engine.run({"gen": {"weights": jnp.float32(1)}}, [np.float32(3)], epochs=1).latest
    assert (latest["train/update_norm"], latest["train/param_norm"]) == (6.0, 7.0)


@pytest.mark.parametrize("which", ["updates", "params"])
def test_unknown_field_raises_an_error_that_lists_the_fields(which):
    with pytest.raises(ValueError, match=r"GradNorm needs 'weights' in the state, but dict has \['params'\]"):
        run(GradNorm(of="weights", **{which: True}), [np.float32(1)])


def test_norm_of_the_gradients_does_not_need_the_field():
    assert history(run(GradNorm(of="weights"), [np.float32(3)])) == {"train/grad_norm": [3.0]}


def test_norm_of_16_bit_gradients_does_not_overflow():
    assert history(run(GradNorm(), [np.float16([300, 400])])) == {"train/grad_norm": [500.0]}


def test_norm_that_is_not_finite_is_recorded():
    values = history(run(GradNorm(), [np.float32([1, np.inf]), np.float32([1, np.nan])]))["train/grad_norm"]
    assert values[0] == np.inf
    assert np.isnan(values[1])


@pytest.mark.parametrize(
    ("when", "due"),
    [
        pytest.param(1, [1, 2, 3, 4, 5, 6], id="every step"),
        pytest.param(2, [2, 4, 6], id="every 2 steps"),
        pytest.param(at(1) | every(5), [1, 5], id="first and every 5"),
        pytest.param(every(epochs=1), [6], id="every epoch"),
    ],
)
def test_norm_is_logged_only_at_due_steps(when, due):
    present = Present()
    engine = Engine(descend, [GradNorm(when=when), present], log_every=1)
    result = engine.run({"params": jnp.float32(0)}, [np.float32(n) for n in range(1, 7)], epochs=1)
    assert present.steps == result.history.steps("train/grad_norm") == due
    assert result.history["train/grad_norm"] == [float(n) for n in due]


def test_mean_counts_only_the_steps_with_a_norm():
    engine = Engine(descend, [GradNorm(when=2)], log_every=4)
    result = engine.run({"params": jnp.float32(0)}, [np.float32(n) for n in (100, 2, 100, 4, 100, 6)], epochs=1)
    assert result.history["train/grad_norm"] == [3.0, 6.0]
    assert result.history["epoch/grad_norm"] == [4.0]


def test_window_without_a_due_step_has_no_norm():
    engine = Engine(descend, [GradNorm(when=at(1))], log_every=2)
    result = engine.run({"params": jnp.float32(0)}, [np.float32(n) for n in (7, 1, 1, 1)], epochs=1)
    assert result.history.steps("train/grad_norm") == [2]
    assert result.history["train/grad_norm"] == [7.0]


def test_norms_do_not_change_the_run():
    rng = np.random.default_rng(0)
    grads = [{"w": rng.normal(size=9).astype(np.float32)} for _ in range(5)]
    plain = Engine(descend).run({"params": {"w": jnp.ones(9)}}, grads, epochs=1)
    normed = run(GradNorm(by_module=True, updates=True, params=True), grads, {"w": jnp.ones(9)})
    assert np.array_equal(plain.state["params"]["w"], normed.state["params"]["w"])


def test_norms_without_jit_are_the_same():
    grads = [np.float32([3, 4]), np.float32([6, 8])]
    norms = GradNorm(updates=True, params=True, when=2)
    assert history(run(norms, grads, jit=False)) == history(run(norms, grads))


@pytest.mark.parametrize("when", [1, 2, at(100)], ids=["every step", "every 2 steps", "never in this run"])
def test_step_without_gradients_raises_an_error_that_says_what_to_return(when):
    message = r"GradNorm needs aux\['grads'\], got aux with \[\]. Return it from the step: .*\{\"grads\": grads\}"
    engine = Engine(lambda state, batch: (state, {}), [GradNorm(when=when)])
    with pytest.raises(ValueError, match=message):
        engine.run(jnp.float32(0), [np.float32(1)], epochs=1)


def test_error_lists_the_entries_of_aux():
    engine = Engine(lambda state, batch: (state, {}, {"gradients": batch}), [GradNorm()])
    with pytest.raises(ValueError, match=r"got aux with \['gradients'\]"):
        engine.run(jnp.float32(0), [np.float32(1)], epochs=1)


def test_metric_of_the_step_with_the_same_name_raises():
    def step(state, batch):
        return state, {"grad_norm": batch}, {"grads": batch}

    with pytest.raises(ValueError, match=r"GradNorm logs 'grad_norm', which is taken"):
        Engine(step, [GradNorm()]).run(jnp.float32(0), [np.float32(1)], epochs=1)


def test_gradients_of_integers_and_other_leaves_without_a_norm_are_left_out():
    def loss(params):
        return (params["net"]["w"] ** 2).sum() + params["index"]["i"]

    def train(state, batch):
        grads = jax.grad(loss, allow_int=True)(state["params"])
        return state, {}, {"grads": grads | {"key": state["params"]["key"]}}

    params = {"net": {"w": jnp.float32([1.5, 2])}, "index": {"i": jnp.int32(3)}, "key": jax.random.key(0)}
    engine = Engine(train, [GradNorm(by_module=True, updates=True, params=True)])
    assert history(engine.run({"params": params}, [0], epochs=1)) == {
        "train/grad_norm": [5.0],
        "train/grad_norm/net": [5.0],
        "train/update_norm": [0.0],
        "train/param_norm": [2.5],
    }


@pytest.mark.parametrize("grads", [None, {}, {"n": jnp.int32(1)}], ids=["None", "empty", "integers"])
def test_gradients_without_floats_raise(grads):
    engine = Engine(lambda state, batch: (state, {}, {"grads": grads}), [GradNorm(by_module=True)])
    with pytest.raises(ValueError, match=r"GradNorm needs floats in aux\['grads'\], got (None|{}|{'n': 'int32.*'})\."):
        engine.run(jnp.float32(0), [0], epochs=1)


def test_field_without_floats_raises_before_the_first_step():
    engine = Engine(lambda state, batch: (state, {}), [GradNorm(params=True, of="step")])
    with pytest.raises(ValueError, match=r"GradNorm needs floats in 'step', got {.*'int32\[\]'}"):
        engine.run({"step": 0}, [0], epochs=1)


def test_invalid_when_raises_when_the_callback_is_made():
    with pytest.raises(ValueError, match=r"GradNorm.when needs a cadence .* got 0"):
        GradNorm(when=0)


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        pytest.param(GradNorm(), "GradNorm()", id="defaults"),
        pytest.param(GradNorm(updates=True, when=every(5)), "GradNorm(updates=True, when=every(steps=5))", id="more"),
    ],
)
def test_repr_reads_like_the_call(norms, text):
    assert repr(norms) == text
