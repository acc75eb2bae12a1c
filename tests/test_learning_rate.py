"""LearningRate: the rate that was applied, for every kind of optimizer, at the steps of the training records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from onstep import Callback, Engine, Loop
from onstep.callbacks import LearningRate

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.5, 3, 10)


def descend(tx):
    """Return a step of this optimizer with gradients of one; the metric is the rate, if the optimizer is SGD."""

    def step(state, batch):
        grads = jax.tree.map(lambda param: batch * jnp.ones_like(param), state["params"])
        with_value = optax.with_extra_args_support(tx)
        updates, opt_state = with_value.update(grads, state["opt_state"], state["params"], value=batch)
        applied = -jax.tree.leaves(updates)[0].sum()
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"applied": applied}

    return step


def run(rate, tx, *, steps=6, log_every=1, params=None, data=None):
    params = {"a": jnp.float32(1), "b": jnp.float32(1)} if params is None else params
    engine = Engine(descend(tx), [rate], log_every=log_every)
    return engine.run({"params": params, "opt_state": tx.init(params)}, data or [1.0] * steps, epochs=1)


@pytest.mark.parametrize(
    ("rate", "tx"),
    [
        pytest.param(LearningRate(SCHEDULE), optax.sgd(SCHEDULE), id="schedule"),
        pytest.param(LearningRate(), optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE), id="injected"),
    ],
)
def test_recorded_rate_is_the_one_that_the_step_applied(rate, tx):
    history = run(rate, tx).history
    assert history["lr"] == history["train/applied"] == pytest.approx([float(SCHEDULE(n)) for n in range(6)])
    assert history.steps("lr") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)), id="adamw"),
        pytest.param(optax.adafactor(SCHEDULE), id="adafactor"),
        pytest.param(optax.chain(optax.sgd(SCHEDULE), optax.contrib.reduce_on_plateau()), id="another count after it"),
        pytest.param(optax.sgd(SCHEDULE, momentum=0.9), id="parameters of that name before it"),
    ],
)
def test_count_is_found_in_every_optimizer(tx):
    history = run(LearningRate(SCHEDULE), tx, params={"count": jnp.ones(3), "learning_rate": jnp.ones(3)}).history
    assert history["lr"] == pytest.approx([float(SCHEDULE(n)) for n in range(6)])


def test_rate_at_the_end_of_each_window_is_recorded():
    history = run(LearningRate(SCHEDULE), optax.sgd(SCHEDULE), steps=8, log_every=3).history
    assert history.steps("lr") == history.steps("train/applied") == [3, 6, 8]
    assert history["lr"] == pytest.approx([float(SCHEDULE(n)) for n in (2, 5, 7)])


def test_rate_of_the_last_update_is_recorded_between_updates():
    def schedule(count):
        return 1.0 - count / 8

    tx = optax.MultiSteps(optax.sgd(schedule), every_k_schedule=2).gradient_transformation()
    assert run(LearningRate(schedule), tx).history["lr"] == [schedule(n) for n in (0, 0, 0, 1, 1, 2)]


def test_step_that_the_optimizer_skips_is_not_counted():
    tx = optax.apply_if_finite(optax.sgd(SCHEDULE), max_consecutive_errors=3)
    result = run(LearningRate(SCHEDULE), tx, data=[1.0, np.nan, 1.0, 1.0])
    assert result.history["lr"] == pytest.approx([float(SCHEDULE(n)) for n in (0, 0, 1, 2)])


def test_rate_set_by_hand_is_recorded_once_it_is_applied():
    tx, rate = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), LearningRate()

    class Halve(Callback):
        when = 2

        def on_step_end(self, loop):
            state = optax.tree.get(loop.state["opt_state"], "learning_rate") / 2
            opt_state = optax.tree.set(loop.state["opt_state"], learning_rate=state)
            loop.state = {**loop.state, "opt_state": opt_state}

    engine = Engine(descend(tx), [rate, Halve()], log_every=1)
    params = jnp.float32(1)
    history = engine.run({"params": params, "opt_state": tx.init(params)}, [1.0] * 5, epochs=1).history
    assert history["train/applied"] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert history["lr"][::2] == [0.5, 0.25, 0.125]


def inject(rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        pytest.param(
            optax.multi_transform({"slow": inject(0.1), "fast": inject(0.9)}, {"a": "slow", "b": "fast"}),
            {"lr/slow": 0.1, "lr/fast": 0.9},
            id="by label",
        ),
        pytest.param(optax.chain(inject(0.1), inject(0.9)), {"lr/0": 0.1, "lr/1": 0.9}, id="in a chain"),
        pytest.param(
            optax.chain(inject(0.1), optax.chain(optax.identity(), inject(0.9))),
            {"lr/0": 0.1, "lr/1/1": 0.9},
            id="at different depths",
        ),
        pytest.param(optax.chain(optax.clip(1.0), inject(0.1)), {"lr": 0.1}, id="one"),
    ],
)
def test_each_rate_is_named_by_its_place(tx, names):
    latest = run(LearningRate(), tx).latest
    assert {name: value for name, value in latest.items() if name.startswith("lr")} == pytest.approx(names)


def test_each_network_of_a_gan_has_its_own_rate():
    gen, disc = optax.sgd(optax.linear_schedule(1.0, 0.0, 10)), inject(0.25)
    state = {"gen": {"opt_state": gen.init(1.0)}, "disc": {"opt_state": disc.init(1.0)}}

    def step(state, batch):
        _, opt_state = gen.update(batch, state["gen"]["opt_state"])
        return {**state, "gen": {"opt_state": opt_state}}, {"loss": batch}

    rates = [
        LearningRate(optax.linear_schedule(1.0, 0.0, 10), of="gen.opt_state", name="lr/gen"),
        LearningRate(of="disc", name="lr/disc"),
    ]
    latest = Engine(step, rates).run(state, [np.float32(1)] * 3, epochs=1).latest
    assert (latest["lr/gen"], latest["lr/disc"]) == pytest.approx((0.8, 0.25))


@pytest.mark.parametrize(
    ("rate", "tx"),
    [
        pytest.param(LearningRate(SCHEDULE, of=None), optax.adam(SCHEDULE), id="schedule"),
        pytest.param(LearningRate(of=None), inject(SCHEDULE), id="injected"),
    ],
)
def test_rate_of_an_nnx_optimizer_is_recorded(rate, tx):
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    graph, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda model: model(batch).sum())(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), {"loss": loss}

    history = Engine(step, [rate], log_every=1).run(state, [np.ones((1, 1), np.float32)] * 3, epochs=1).history
    assert history["lr"] == pytest.approx([float(SCHEDULE(n)) for n in range(3)])


def test_every_callback_gets_the_rate_once_in_any_order():
    records = []

    class Sink(Callback):
        def on_log(self, loop, record):
            records.append((record.step, *record.values))

    tx, params = inject(0.5), jnp.float32(1)
    engine = Engine(descend(tx), [Sink(), LearningRate(), Sink()], log_every=2)
    engine.run({"params": params, "opt_state": tx.init(params)}, [1.0] * 2, epochs=1)
    assert sorted(records) == sorted([(2, "train/applied"), (2, "lr"), (2, "epoch/applied")] * 2)


def test_rate_is_read_only_at_training_records(monkeypatch):
    reads = []

    class Tripwire:
        """A rate on the device that writes down the step at which it is read."""

        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            reads.append(self.step)
            return np.asarray(0.5, dtype)

    monkeypatch.setattr(Loop, "state", property(lambda loop: {"learning_rate": Tripwire(loop.step)}))
    engine = Engine(lambda state, batch: (state, {"loss": 1.0}), [LearningRate(of=None)], log_every=3)
    engine.run({"learning_rate": 0.5}, [0] * 7, epochs=1)
    assert reads == [3, 6, 7]


def test_resumed_run_continues_to_record():
    tx, params = optax.adam(SCHEDULE), jnp.float32(1)
    engine = Engine(descend(tx), [LearningRate(SCHEDULE)], log_every=2)
    first = engine.run({"params": params, "opt_state": tx.init(params)}, [1.0] * 9, steps=4)
    second = engine.run(first, [1.0] * 9, steps=8)
    assert second.history.steps("lr") == [6, 8]
    assert second.history["lr"] == pytest.approx([float(SCHEDULE(n)) for n in (5, 7)])


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        pytest.param(
            LearningRate(), "a scalar 'learning_rate' in opt_state, got .'0/count'.* optax.inject_h", id="rate"
        ),
        pytest.param(LearningRate(SCHEDULE, of="params"), "a scalar 'count' in params, got .'a', 'b'.", id="count"),
        pytest.param(LearningRate(of="optimizer"), "'optimizer' in the state, but dict has", id="field"),
    ],
)
def test_state_without_a_count_or_rate_raises_when_the_run_starts(rate, message):
    with pytest.raises(ValueError, match=f"LearningRate needs {message}"):
        run(rate, optax.adam(0.1))


def test_constant_schedule_raises():
    with pytest.raises(TypeError, match=r"LearningRate needs schedule to be a function of the count, got 0.001"):
        LearningRate(1e-3)


def cosine(count):
    return jnp.cos(count)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        pytest.param(LearningRate(), "LearningRate()", id="defaults"),
        pytest.param(LearningRate(cosine, name="lr/gen"), "LearningRate(schedule=cosine, name='lr/gen')", id="more"),
    ],
)
def test_repr_reads_like_the_call(rate, text):
    assert repr(rate) == text
