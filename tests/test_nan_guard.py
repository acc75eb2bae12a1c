"""NaNGuard: the step and the leaf that it names, when it reads, what is saved, and what is undone."""

import os

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState
from models import Tripwire, compilations, epoch, fresh_state
from models import step as real_step
from onstep import Callback, Engine, Loop, every
from onstep.callbacks import EMA, Checkpoint, GradNorm, NaNGuard
from onstep.callbacks.checkpoint import load
from onstep.callbacks.nan_guard import GuardCarry
from onstep.testing import same_bytes

NAN, INF = np.nan, np.inf


def step(state, batch):
    """Take all values from the batch."""
    new = {"count": state["count"] + 1, "w": state["w"] + batch["w"]}
    return new, {"loss": batch["loss"]}, {"grads": {"a": batch["a"], "b": {"c": batch["c"]}}}


def fresh():
    return {"count": jnp.int32(0), "w": jnp.float32(0)}


def batches(count, **bad):
    """Return batches of ones; `loss={8: nan}` puts a NaN in the loss of step 8."""
    values = {name: np.ones(count, np.float32) for name in ("loss", "a", "c", "w")}
    for name, by_step in bad.items():
        for at, value in by_step.items():
            values[name][at - 1] = value
    return [{name: column[n] for name, column in values.items()} for n in range(count)]


def run(guard, data, *others, jit=True, **target):
    engine = Engine(step, [guard, *others], log_every=4, jit=jit)
    return engine.run(fresh(), data, **(target or {"epochs": 1}))


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


@pytest.mark.parametrize("jit", [True, False], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("loss", NAN, r"non-finite loss at step 6 \(NaN\)"),
        ("loss", INF, r"non-finite loss at step 6 \(inf\)"),
        ("a", -INF, r"non-finite grads/a at step 6 \(inf\)"),
        ("c", NAN, r"non-finite grads/b/c at step 6 \(NaN\)"),
        ("w", NAN, r"non-finite state/w at step 6 \(NaN\)"),
        ("w", INF, r"non-finite state/w at step 6 \(inf\)"),
    ],
)
def test_error_names_the_step_and_the_leaf(where, value, message, jit):
    with pytest.raises(FloatingPointError, match=message) as caught:
        run(NaNGuard(state=True, when=4), batches(12, **{where: {6: value}}), jit=jit)
    assert caught.value.__notes__ == ["onstep: raised by NaNGuard.on_step_end at step 8"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"c": {3: NAN}, "loss": {4: NAN}}, "non-finite grads/b/c at step 3"),
        ({"c": {3: NAN}, "a": {3: INF}}, "non-finite grads/a at step 3"),
        ({"a": {3: NAN}, "loss": {3: INF}}, r"non-finite loss at step 3 \(inf\)"),
        ({"w": {3: NAN}, "c": {3: NAN}}, "non-finite grads/b/c at step 3"),
    ],
    ids=["the first step", "the first leaf", "metrics before gradients", "gradients before the state"],
)
def test_error_names_the_first_of_several(bad, message):
    with pytest.raises(FloatingPointError, match=message):
        run(NaNGuard(state=True), batches(8, **bad))


def test_nan_is_named_before_an_inf_in_the_same_leaf():
    guard = NaNGuard()
    engine = Engine(lambda state, batch: (state, {}, {"grads": batch}), [guard])
    with pytest.raises(FloatingPointError, match=r"non-finite grads at step 2 \(NaN\)"):
        engine.run(jnp.float32(0), [np.float32([1, 2, 3]), np.float32([1, INF, NAN])], epochs=1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_every_kind_of_float_is_checked(dtype):
    engine = Engine(lambda state, batch: (state, {}, {"grads": batch.astype(dtype)}), [NaNGuard()])
    with pytest.raises(FloatingPointError, match="non-finite grads at step 2"):
        engine.run(jnp.float32(0), [np.float32([1, 60000]), np.float32([1, INF])], epochs=1)


def test_64_bit_floats_are_checked_in_64_bits():
    engine = Engine(lambda state, batch: (state, {"loss": batch}), [NaNGuard()])
    with jax.enable_x64(True), pytest.raises(FloatingPointError, match="non-finite loss at step 2"):
        engine.run(jnp.float32(0), [np.float64(1e300), np.float64(INF)], epochs=1)


@pytest.mark.parametrize("options", [{}, {"state": True}, {"skip": True}], ids=["plain", "state", "skip"])
def test_no_dtype_is_promoted_implicitly(options):
    with jax.numpy_dtype_promotion("strict"):
        result = run(NaNGuard(**options), batches(3))
    assert float(result.state["w"]) == 3


def test_the_check_of_the_state_compiles_once_for_all_leaves_of_a_shape():
    state = {f"w{i}": jnp.ones(17) for i in range(9)}
    engine = Engine(lambda state, batch: (state, {"loss": 1.0}), [NaNGuard()], steps_per_call=1)
    engine.run(state, [1], steps=0)  # checks the first state
    with compilations() as seen:
        engine.run({"other": jnp.ones(17), **state}, [1], steps=0)
    assert len(seen) == 1  # the first carry


def test_clu_metrics_are_checked():
    @flax.struct.dataclass
    class Metrics(clu.metrics.Collection):
        loss: clu.metrics.Average.from_output("loss")

    engine = Engine(lambda s, batch: (s, Metrics.single_from_model_output(loss=batch)), [NaNGuard()])
    with pytest.raises(FloatingPointError, match="non-finite loss/total at step 2"):
        engine.run(jnp.float32(0), [np.float32(1), np.float32(NAN)], epochs=1)


def test_metrics_logged_by_an_earlier_callback_are_checked():
    engine = Engine(step, [GradNorm(), NaNGuard(ignore="grads")])
    with pytest.raises(FloatingPointError, match="non-finite grad_norm at step 3"):
        engine.run(fresh(), batches(4, a={3: INF}), epochs=1)


def test_guard_in_two_engines_names_the_leaves_of_each():
    guard = NaNGuard()
    one = Engine(step, [guard])
    other = Engine(lambda state, batch: (state, {"accuracy": 1.0, "cost": batch}), [guard])
    one.run(fresh(), batches(2), epochs=1)
    with pytest.raises(FloatingPointError, match="non-finite cost at step 1"):
        other.run(jnp.float32(0), [np.float32(NAN)], epochs=1)
    with pytest.raises(FloatingPointError, match="non-finite grads/a at step 1"):
        one.run(fresh(), batches(2, a={1: NAN}), epochs=1)


def test_host_reads_only_at_due_steps_and_at_the_end(monkeypatch):
    reads = []
    monkeypatch.setattr(Loop, "carries", property(lambda loop: {"NaNGuard": Tripwire(loop.step, reads, (5,), 0)}))
    engine = Engine(lambda state, batch: (state, {"loss": state}), [NaNGuard(when=20)], log_every=7)
    engine.run(jnp.float32(0), range(50), epochs=1)
    assert sorted(set(reads)) == [20, 40, 50]


@pytest.mark.parametrize("options", [{}, {"state": True}, {"skip": True}], ids=["plain", "state", "skip"])
def test_guard_does_not_change_the_bytes_of_a_finite_run(options):
    state = fresh_state()
    plain = Engine(real_step).run(state, epoch, epochs=2, rng=jax.random.key(1))
    guarded = Engine(real_step, [NaNGuard(**options)]).run(state, epoch, epochs=2, rng=jax.random.key(1))
    assert same_bytes(plain.state, guarded.state)
    assert guarded.history["epoch/loss"] == plain.history["epoch/loss"]


def in_order(guard, checkpoint, first):
    return [guard, checkpoint] if first == "guard" else [checkpoint, guard]


@pytest.mark.parametrize("first", ["guard", "checkpoint"])
@pytest.mark.parametrize(("bad", "when"), [(8, 4), (7, 4), (7, 1000)])
def test_no_checkpoint_holds_a_nan(bad, when, first, tmp_path):
    callbacks = in_order(NaNGuard(when=when), Checkpoint(tmp_path, when=1), first)
    with pytest.raises(FloatingPointError, match=f"non-finite loss at step {bad}"):
        Engine(step, callbacks).run(fresh(), batches(12, loss={bad: NAN}, w={bad: NAN}), epochs=1)
    assert steps_in(tmp_path)[-1] == bad - 1
    assert float(load(tmp_path, fresh())["w"]) == bad - 1


@pytest.mark.parametrize("first", ["guard", "checkpoint"])
@pytest.mark.parametrize("how", ["target", "stop", "resumable stop", "for"])
def test_nan_in_the_last_steps_raises_before_the_last_save(how, first, tmp_path):
    engine = Engine(step, in_order(NaNGuard(), Checkpoint(tmp_path, when=4), first))
    data = batches(9, c={7: NAN})
    with pytest.raises(FloatingPointError, match="non-finite grads/b/c at step 7"):  # noqa: PT012
        if how == "for":
            with engine.steps(fresh(), data, epochs=1) as steps:
                next(loop for loop in steps if loop.step == 7)
        else:
            if "stop" in how:
                engine.on("step_end")(lambda loop: loop.step == 7 and loop.stop("enough", final=how == "stop"))
            engine.run(fresh(), data, epochs=1)
    assert steps_in(tmp_path) == [4]


def test_nan_in_the_last_steps_raises_without_a_checkpoint():
    with pytest.raises(FloatingPointError, match="non-finite loss at step 3"):
        run(NaNGuard(), batches(3, loss={3: NAN}))


def test_nan_only_in_the_state_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"non-finite state/w at or before step 6 .*NaNGuard\(state=True\)"):
        run(NaNGuard(), batches(8, w={5: NAN}), Checkpoint(tmp_path, when=3))
    assert steps_in(tmp_path) == [3]


def test_nan_that_a_callback_puts_in_the_state_is_not_saved(tmp_path):
    class Breaks(Callback):
        when = every(5)

        def on_step_end(self, loop):
            loop.state = {**loop.state, "w": NAN * loop.state["w"]}

    with pytest.raises(FloatingPointError, match="non-finite state/w at or before step 5"):
        run(NaNGuard(state=True), batches(8), Checkpoint(tmp_path, when=1), Breaks())
    assert steps_in(tmp_path)[-1] == 4


def test_failed_run_resumes_from_its_last_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="step 6"):
        run(NaNGuard(), batches(9, loss={6: NAN}), Checkpoint(tmp_path, when=2))
    assert steps_in(tmp_path) == [2, 4]
    result = run(NaNGuard(), batches(9), Checkpoint(tmp_path, when=2))
    assert (result.step, float(result.state["w"])) == (9, 9)


def test_failed_run_leaves_no_trace_in_the_guard():
    guard = NaNGuard()
    engine = Engine(step, [guard])
    with pytest.raises(FloatingPointError, match="step 2"):
        engine.run(fresh(), batches(3, loss={2: NAN}), epochs=1)
    assert guard.get_state() == {}
    assert engine.run(fresh(), batches(3), epochs=1).step == 3


def test_snapshot_taken_by_a_callback_raises():
    engine = Engine(step, [NaNGuard()])
    engine.on("step_end", when=3)(lambda loop: loop.snapshot())
    with pytest.raises(FloatingPointError, match="non-finite loss at step 2") as caught:
        engine.run(fresh(), batches(9, loss={2: NAN}), epochs=1)
    assert caught.value.__notes__ == [
        "onstep: raised by NaNGuard.on_snapshot at step 3",
        "onstep: raised by <lambda>.on_step_end at step 3",
    ]


@pytest.mark.parametrize("state", [False, True], ids=["at saves", "at every step"])
def test_leaves_that_are_not_finite_at_the_start_stay_exempt(state, tmp_path):
    first = {"best": jnp.float32(INF), "w": jnp.float32(0)}
    engine = Engine(
        lambda state, batch: ({"best": state["best"], "w": state["w"] + batch}, {"loss": 1.0}),
        [NaNGuard(state=state), Checkpoint(tmp_path, when=2)],
    )
    data = list(np.float32([1, 1, 1, 1, 1, NAN]))
    assert engine.run(first, data, steps=4).step == 4
    found = "at step 6" if state else "at or before step 6"
    with pytest.raises(FloatingPointError, match=f"non-finite state/w {found}"):
        engine.run(first, data, steps=6)


def test_integers_and_keys_are_not_checked():
    def count(state, batch):
        return {"n": state["n"] + 1, "key": jax.random.split(state["key"])[0]}, {"loss": batch["loss"], "seen": 3}

    state = {"n": 0, "key": jax.random.key(0)}
    result = Engine(count, [NaNGuard(state=True)]).run(state, batches(3), epochs=1)
    assert int(result.state["n"]) == 3


@pytest.mark.parametrize("jit", [True, False], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize("where", ["loss", "a", "w"])
def test_skipped_step_leaves_the_state_unchanged(where, jit):
    guard = NaNGuard(skip=True)
    data = batches(9, **{where: {3: NAN, 4: INF, 9: NAN}})
    result = run(guard, data, jit=jit)
    left = [batch for n, batch in enumerate(data, 1) if n not in (3, 4, 9)]
    assert same_bytes(result.state, Engine(step).run(fresh(), left, epochs=1).state)
    assert (result.step, guard.skipped(result)) == (9, 3)


def test_share_of_skipped_steps_is_recorded_and_their_metrics_are_kept():
    history = run(NaNGuard(skip=True), batches(10, a={2: NAN}, loss={7: NAN, 8: NAN})).history
    assert history["train/skipped"] == [0.25, 0.5, 0]
    assert history["epoch/skipped"] == [0.3]
    assert np.array_equal(history["train/loss"], [1, NAN, 1], equal_nan=True)


def test_skipped_can_be_read_during_the_run():
    seen, guard = [], NaNGuard(skip=True)
    engine = Engine(step, [guard])
    engine.on("step_end")(lambda loop: seen.append(guard.skipped(loop)))
    engine.run(fresh(), batches(5, loss={2: NAN, 4: INF}), epochs=1)
    assert seen == [0, 1, 1, 2, 2]


def test_resumed_run_skips_and_counts_like_an_uninterrupted_one(tmp_path):
    data, guard = batches(12, loss={2: NAN, 6: NAN, 7: NAN, 9: INF}), NaNGuard(skip=True)
    whole = run(guard, data)
    run(guard, data, Checkpoint(tmp_path, when=6), steps=6)
    resumed = run(guard, data, Checkpoint(tmp_path, when=6))
    assert same_bytes(resumed.state, whole.state)
    assert same_bytes(resumed.carry(guard), whole.carry(guard))
    assert guard.skipped(resumed) == 4


def test_resumed_run_may_turn_skip_off(tmp_path):
    run(NaNGuard(skip=True), batches(8, loss={4: NAN}), Checkpoint(tmp_path, when=4), steps=4)
    result = run(NaNGuard(), batches(8), Checkpoint(tmp_path, when=4))
    assert (result.step, float(result.state["w"])) == (8, 7)


def bad_at(*steps):
    return batches(12, loss=dict.fromkeys(steps, NAN))


def test_max_skips_steps_in_a_row_are_skipped():
    guard = NaNGuard(skip=True, max_skips=3)
    assert guard.skipped(run(guard, bad_at(1, 2, 3, 5, 6, 7, 10, 11, 12))) == 9


@pytest.mark.parametrize("when", [1, 50])
def test_one_more_step_in_a_row_raises_even_if_later_steps_are_finite(when):
    message = r"non-finite loss at step 8 \(NaN\), after max_skips=3 undone steps in a row"
    with pytest.raises(FloatingPointError, match=message):
        run(NaNGuard(skip=True, max_skips=3, when=when), bad_at(2, 5, 6, 7, 8, 9, 11))


def test_skips_in_a_row_are_counted_across_a_resume(tmp_path):
    def guarded(**target):
        run(NaNGuard(skip=True, max_skips=3), bad_at(4, 5, 6, 7), Checkpoint(tmp_path, when=2), **target)

    guarded(steps=6)
    with pytest.raises(FloatingPointError, match="at step 7"):
        guarded(epochs=1)


def test_counters_and_keys_of_a_flax_state_are_restored():
    class State(TrainState):
        key: jax.Array
        seen: jax.Array

    def learn(state, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] * batch))(state.params)
        state = state.apply_gradients(grads=grads, key=jax.random.split(state.key)[0], seen=state.seen + 1)
        return state, {"loss": loss}, {"grads": grads}

    base = fresh_state()
    state = State.create(
        apply_fn=base.apply_fn, params={"w": jnp.ones(2)}, tx=base.tx, key=jax.random.key(3), seen=jnp.int8([0, 0])
    )
    guard, data = NaNGuard(skip=True), [np.float32([n, 1]) for n in (1, 2, NAN, 4)]
    result = Engine(learn, [guard]).run(state, data, epochs=1)
    left = Engine(learn).run(state, [data[0], data[1], data[3]], epochs=1)
    assert same_bytes(result.state, left.state)
    assert (int(result.state.step), guard.skipped(result)) == (3, 1)


def test_average_later_in_the_list_sees_the_restored_state():
    ema = EMA(0.5, of="w")
    result = run(NaNGuard(skip=True), batches(3, w={2: NAN}), ema)
    assert float(ema.params(result)) == 0.5 * (0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 1) + 0.5 * 2


def test_skip_after_an_average_in_the_list_raises():
    engine = Engine(step, [EMA(of="w", name="slow"), NaNGuard(skip=True)])
    with pytest.raises(ValueError, match=r"NaNGuard\(skip=True\) needs to come before slow in the list"):
        engine.run(fresh(), batches(3), epochs=1)


def test_guard_may_follow_an_average_without_skip_and_callbacks_without_floats():
    class Counts(Callback):
        def init(self, state):
            return jnp.int32(0)

        def update(self, carry, ctx):
            return carry + 1, ctx

    assert Engine(step, [EMA(of="w"), NaNGuard()]).run(fresh(), batches(2), epochs=1).step == 2
    assert Engine(step, [GradNorm(), Counts(), NaNGuard(skip=True)]).run(fresh(), batches(2), epochs=1).step == 2


@pytest.mark.parametrize("ignore", ["loss", ("grads/a", "loss")], ids=["a name", "several"])
def test_ignored_names_may_hold_anything(ignore):
    with pytest.raises(FloatingPointError, match="non-finite grads/b/c at step 4"):
        run(NaNGuard(ignore=ignore), batches(6, loss={2: NAN}, c={4: NAN}))


def test_ignoring_the_first_part_of_a_name_ignores_everything_below_it(tmp_path):
    data = batches(6, a={1: NAN}, c={2: NAN}, w={3: INF})
    run(NaNGuard(ignore=("grads", "state/w"), state=True), data, Checkpoint(tmp_path, when=2))
    assert steps_in(tmp_path) == [2, 4, 6]
    with pytest.raises(FloatingPointError, match="non-finite grads/a at step 1"):
        run(NaNGuard(ignore="grads/b"), data)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("losss", "found nothing named 'losss' to ignore. Did you mean loss?"),
        ("grads/b/", "nothing named 'grads/b/' to ignore. Did you mean grads/b/c?"),
        ("state/count", "nothing named 'state/count' to ignore"),
    ],
    ids=["misspelt", "trailing slash", "integer"],
)
def test_unknown_name_to_ignore_raises(ignore, message):
    with pytest.raises(ValueError, match=message):
        run(NaNGuard(ignore=ignore), batches(2))


def test_step_that_returns_nothing_to_check_raises():
    engine = Engine(lambda state, batch: (state, {"seen": 3}), [NaNGuard()])
    with pytest.raises(ValueError, match=r"needs floats to check, .* NaNGuard\(state=True\)"):
        engine.run(jnp.float32(0), [1], epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": True, "max_skips": 0}, "NaNGuard needs max_skips to be a whole number >= 1, got 0"),
        ({"skip": True, "max_skips": 1.5}, "NaNGuard needs max_skips to be a whole number >= 1, got 1.5"),
        ({"max_skips": 3}, "NaNGuard needs skip=True for max_skips=3"),
    ],
    ids=["zero", "fraction", "without skip"],
)
def test_arguments_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        NaNGuard(**options)


def test_invalid_when_raises():
    with pytest.raises(ValueError, match="NaNGuard.when needs a cadence .* got 0"):
        NaNGuard(when=0)


def test_metric_of_the_step_named_skipped_raises():
    engine = Engine(lambda state, batch: (state, {"skipped": state}), [NaNGuard(skip=True)])
    with pytest.raises(ValueError, match="NaNGuard logs 'skipped', which is taken"):
        engine.run(jnp.float32(0), [1], epochs=1)


def test_metric_and_gradients_of_one_name_are_both_checked():
    engine = Engine(lambda state, batch: (state, {"grads": batch[0]}, {"grads": batch[1]}), [NaNGuard()])
    for bad in ([NAN, 1], [1, NAN]):
        with pytest.raises(FloatingPointError, match="non-finite grads at step 1"):
            engine.run(jnp.float32(0), [np.float32(bad)], epochs=1)


def test_packed_carry_keeps_its_parts():
    carry = GuardCarry(jnp.int32(3), jnp.int32(9), jnp.int32(0), jnp.int32(1), jnp.int32([0, 2])).pack()
    step, code, skipped, in_a_row, kinds = GuardCarry.unpack(np.asarray(carry))
    assert (step, code, skipped, in_a_row, kinds.tolist()) == (3, 9, 0, 1, [0, 2])


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        pytest.param(NaNGuard(), "NaNGuard()", id="defaults"),
        pytest.param(NaNGuard(skip=True, max_skips=3), "NaNGuard(skip=True, max_skips=3)", id="skip"),
        pytest.param(
            NaNGuard(ignore=("loss", "grads/a"), when=1), "NaNGuard(ignore=('loss', 'grads/a'), when=1)", id="ignore"
        ),
    ],
)
def test_repr_reads_like_the_call(guard, text):
    assert repr(guard) == text
