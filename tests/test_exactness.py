"""Exact reproducibility: with and without observers, in any order, and resumed after any step."""

import functools
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import EXAMPLES, TX, X, Y, epoch, evaluation, fresh_state, step
from onstep import Batches, Callback, Engine, every
from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate, GradNorm, NaNGuard, Progress, TensorBoard
from onstep.testing import StopAt, same_bytes

KEY = jax.random.key(7)
VALIDATION = Batches({"x": X, "y": Y}, 10, shuffle=False, drop_last=False)


class Draws(Callback):
    """Draw from a NumPy generator after every step."""

    def __init__(self):
        self.generator, self.drawn = np.random.default_rng(3), []

    def on_step_end(self, loop):
        self.drawn.append(int(self.generator.integers(1000)))

    def get_state(self):
        return {"generator": self.generator.bit_generator.state, "drawn": self.drawn}

    def set_state(self, state):
        self.generator.bit_generator.state = state["generator"]
        self.drawn = list(state["drawn"])


class Adds(Callback):
    """A compiled half that is due every third step and counts."""

    update_when = every(steps=3)

    def init(self, state):
        return 0

    def update(self, carry, ctx):
        return carry + 1, ctx.log(third=carry)


def observers(directory):
    ema = EMA(0.9, warmup=3)
    return ema, [
        ema,
        GradNorm(by_module=True, updates=True, params=True, when=2),
        Adds(),
        Draws(),
        Evaluate(evaluation, VALIDATION, using=ema, when=every(5)),
        EarlyStopping("val/accuracy", patience=100, mode="max"),
        Checkpoint(directory / "run", when=every(4)),
        TensorBoard(directory / "run"),
        Progress(interval=1e-6, file=io.StringIO()),
    ]


def run(callbacks=(), *, data=epoch, state=None, log_every=5, **targets):
    engine = Engine(step, callbacks, log_every=log_every)
    return engine.run(state or fresh_state(), data, rng=KEY, **(targets or {"epochs": 3}))


@pytest.fixture(scope="module")
def plain():
    return run()


def test_observers_do_not_change_a_byte_of_the_state(plain, tmp_path):
    _, callbacks = observers(tmp_path)
    assert same_bytes(run(callbacks).state, plain.state)


def linear(params, x):
    return x @ params["w"] + params["b"]


def elementwise(params, x):
    return jnp.tanh(params["a"] * x) * params["c"] + params["b"] * x


MODELS = {  # in small models, XLA fuses almost everything with its neighbors
    "linear": (linear, {"w": (2, 1), "b": (1,)}, optax.adam(1e-2)),
    "elementwise": (elementwise, {"a": (16,), "b": (16,), "c": (16,)}, optax.sgd(0.03, momentum=0.9)),
}


def small_run(model, callbacks, steps_per_call):
    forward, shapes, tx = MODELS[model]
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = random.normal(size=(24, 8, 2) if model == "linear" else (24, 16)).astype(np.float32)
    y = random.normal(size=(24, 8, 1) if model == "linear" else (24, 16)).astype(np.float32)

    def small_step(state, batch):
        def mean_loss(params):
            return ((forward(params, batch["x"]) - batch["y"]) ** 2).mean()

        loss, grads = jax.value_and_grad(mean_loss)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        return new, {"loss": loss}, {"grads": grads}

    data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    engine = Engine(small_step, callbacks, steps_per_call=steps_per_call, log_every=24)
    return engine.run({"params": params, "opt_state": tx.init(params)}, data, epochs=1)


@functools.cache
def small_run_alone(model, steps_per_call):
    return small_run(model, [], steps_per_call)


@pytest.mark.parametrize(
    ("model", "steps_per_call", "observer"),
    [  # each of these differed on some version of jax, while observers were not kept out of the step
        ("linear", 1, lambda: GradNorm(when=3)),
        ("linear", 8, lambda: EMA(0.9, when=3)),
        ("linear", 8, lambda: NaNGuard()),
        ("elementwise", 8, lambda: GradNorm()),
    ],
)
def test_compiled_halves_do_not_change_a_byte_of_small_models(model, steps_per_call, observer):
    expected = small_run_alone(model, steps_per_call)
    result = small_run(model, [observer()], steps_per_call)
    assert same_bytes(result.state, expected.state)
    assert result.history["train/loss"] == expected.history["train/loss"]


def test_small_block_is_not_compiled_to_one_piece_of_machine_code():
    engine, traced = Engine(lambda state, batch: (state * 0.9 + batch, {}), [EMA(0.5, of=None)], steps_per_call=4), []
    call = engine._compiled.call

    def traced_call(*args):
        return call(*args)

    traced_call.trace = lambda *args: traced.append(call.trace(*args)) or traced[0]
    engine._compiled.call = traced_call
    engine.run(jnp.float32(0), [1.0] * 4, epochs=1)
    assert "small_call" not in traced[0].lower().compile().as_text()  # XLA's name for such a piece


class Scales(Callback):
    """A compiled half that changes the state."""

    def update(self, carry, ctx):
        return carry, ctx.replace(state=ctx.state * 0.997)


class Shifts(Callback):
    """Another one."""

    def update(self, carry, ctx):
        return carry, ctx.replace(state=ctx.state + 0.3 * ctx.batch)


def test_observer_between_halves_that_change_the_state_does_not_change_a_byte():
    random = np.random.default_rng(0)
    data = list(random.normal(size=(24, 16)).astype(np.float32))
    state = jnp.asarray(random.normal(size=16), jnp.float32)

    def scaled(state, batch):
        return state * 0.99 + batch * 0.123, {"loss": state.sum()}

    def last(*callbacks):
        return Engine(scaled, callbacks, steps_per_call=8).run(state, data, epochs=1).state

    assert same_bytes(last(Scales(), EMA(0.9, of=None), Shifts()), last(Scales(), Shifts()))


def test_aux_may_hold_more_than_arrays():
    class Rows(Callback):
        def update(self, carry, ctx):
            return carry, ctx.log(rows=jnp.zeros(ctx.aux["rows"]).size, kind=len(ctx.aux["kind"]))

    def with_notes(state, batch):
        return state + batch.sum(), {}, {"rows": len(batch), "kind": "sum", "none": None}

    result = Engine(with_notes, [Rows()]).run(jnp.float32(0), [np.ones(3, np.float32)], epochs=1)
    assert (result.latest["train/rows"], result.latest["train/kind"]) == (3, 3)


@pytest.mark.parametrize("shift", range(4))
def test_order_of_observers_does_not_change_a_byte(plain, whole, shift, tmp_path):
    expected = whole[1].params(whole[0])
    ema, callbacks = observers(tmp_path)
    result = run(callbacks[::-1] if shift == 0 else callbacks[2 * shift :] + callbacks[: 2 * shift])
    assert same_bytes(result.state, plain.state)
    assert same_bytes(ema.params(result), expected)


def test_log_every_and_in_flight_do_not_change_a_byte(plain):
    engine = Engine(step, log_every=1, in_flight=1)
    assert same_bytes(engine.run(fresh_state(), epoch, epochs=3, rng=KEY).state, plain.state)


def test_engine_computes_what_a_plain_loop_computes(plain):
    state, jitted = fresh_state(), jax.jit(step)
    for number, batch in enumerate(itertools.chain.from_iterable(map(epoch, range(3)))):
        state, _, _ = jitted(state, batch, jax.random.fold_in(KEY, number))
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-7), state.params, plain.state.params)
    assert all(jax.tree.leaves(close))


def points(history, name):
    return list(zip(history.steps(name), history[name], strict=True)) if name in history else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    seen = []
    ema, callbacks = observers(tmp_path_factory.mktemp("whole"))
    return run(callbacks, data=lambda number: epoch(number, seen)), ema, callbacks[3].drawn, seen


@pytest.mark.parametrize("cut", [1, 7, 12, 17, 24, 35])
@pytest.mark.parametrize("through", ["result", "checkpoint"])
def test_resumed_run_ends_in_the_same_bytes_and_records(cut, through, whole, tmp_path):
    expected, expected_ema, expected_draws, expected_batches = whole
    seen = []
    ema, callbacks = observers(tmp_path)
    engine = Engine(step, [*callbacks, StopAt(cut, final=False, reason="cut")], log_every=5)
    first = engine.run(fresh_state(), lambda number: epoch(number, seen), epochs=3, rng=KEY)
    assert (first.step, first.stopped) == (cut, "cut")
    if through == "checkpoint":
        ema, callbacks = observers(tmp_path)
    engine = Engine(step, callbacks, log_every=5)
    start = first if through == "result" else fresh_state()
    second = engine.run(start, lambda number: epoch(number, seen), epochs=3, rng=KEY)
    assert seen[:cut] + seen[cut + (cut % 12 or 12) :] == expected_batches  # skipped batches are drawn again
    assert same_bytes(second.state, expected.state)
    assert same_bytes(second.carry(ema), expected.carry(expected_ema))
    assert second.latest == expected.latest
    assert callbacks[3].drawn == expected_draws
    for name in expected.history:
        assert points(first.history, name) + points(second.history, name) == points(expected.history, name)


def test_batches_resumed_from_a_checkpoint_end_in_the_same_bytes(tmp_path):
    data = Batches({"x": X, "y": Y}, 5, seed=1)
    whole = run(data=data, epochs=4)
    first = run([Checkpoint(tmp_path)], data=data, steps=6)
    second = run([Checkpoint(tmp_path)], data=Batches({"x": X, "y": Y}, 5, seed=1), epochs=4)
    assert (first.step, second.step, len(data)) == (6, 16, EXAMPLES // 5)
    assert same_bytes(second.state, whole.state)


def test_grain_resumes_from_its_own_state(tmp_path):
    import grain

    def source():
        rows = grain.MapDataset.range(EXAMPLES).seed(5).shuffle()
        return rows.map(lambda i: {"x": X[i], "y": Y[i]}).batch(4).to_iter_dataset()

    whole = run(data=source(), epochs=3)
    run([Checkpoint(tmp_path)], data=source(), steps=8)
    assert same_bytes(run([Checkpoint(tmp_path)], data=source(), epochs=3).state, whole.state)


def test_generator_is_skipped_to_the_saved_position(tmp_path, capsys):
    def stream():
        for number in itertools.count():
            yield from epoch(number)

    whole = run(data=stream(), steps=20)
    run([Checkpoint(tmp_path, when=4)], data=stream(), steps=13)
    second = run([Checkpoint(tmp_path, when=4)], data=stream(), steps=20)
    assert same_bytes(second.state, whole.state)
    assert "skipping the first 13 batches" in capsys.readouterr().err


def test_learning_rate_schedule_continues_when_resumed(tmp_path):
    def rate(state, batch):
        count = optax.tree.get(state.opt_state, "count", filtering=lambda path, _: "Schedule" in str(path))
        state, _, _ = step(state, batch, KEY)
        return state, {"rate": optax.cosine_decay_schedule(1e-2, 36)(count)}

    def rates(steps, **options):
        return (
            Engine(rate, [Checkpoint(tmp_path, **options)], log_every=1).run(fresh_state(), epoch, steps=steps).history
        )

    first, second = rates(5)["train/rate"], rates(10)["train/rate"]
    expected = [float(optax.cosine_decay_schedule(1e-2, 36)(np.int32(n))) for n in range(10)]
    assert first + second == pytest.approx(expected, rel=1e-6)
    assert TX is fresh_state().tx
