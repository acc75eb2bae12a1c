"""SWA: the mean against numpy and the published algorithm, the points that count, and how it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from onstep import Callback, Engine, at, every
from onstep.callbacks import SWA, Checkpoint, Evaluate
from onstep.callbacks.swa import SwaCarry
from onstep.testing import same_bytes
from onstep.tools import signature


def follow(state, batch):
    """The batch becomes the parameters."""
    return {**state, "params": batch}, {}


def run(swa, points, **options):
    """Run with parameters that take these values; the first is the initial one."""
    data = [np.asarray(point, np.float32) for point in points[1:]]
    return Engine(follow, [swa], **options).run({"params": np.asarray(points[0], np.float32)}, data, epochs=1)


def algorithm(points, start, cycle):
    """Return the average of Algorithm 1 of Izmailov et al. (2018), from the weights after `start` steps."""
    average = points[start]
    for i, weights in enumerate(points[start + 1 :], 1):
        if i % cycle == 0:
            models = i / cycle
            average = (average * models + weights) / (models + 1)
    return average


def test_mean_matches_numpy():
    points = np.random.default_rng(0).normal(size=(34, 5))
    np.testing.assert_allclose(run(SWA(start=0, when=1), points).state["params"], points[-1], rtol=1e-6)
    swa = SWA(start=0, when=1)
    np.testing.assert_allclose(swa.params(run(swa, points)), points[1:].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "cycle"), [(4, 1), (4, 2), (6, 3), (8, 4)])
def test_mean_matches_the_published_algorithm(start, cycle):
    points = np.random.default_rng(1).normal(size=21)
    swa = SWA(start=start, when=cycle)
    assert float(swa.params(run(swa, points))) == pytest.approx(algorithm(points, start, cycle), rel=1e-5)


@pytest.mark.parametrize(
    ("start", "when", "counted"),
    [
        pytest.param(0, 1, [1, 2, 3, 4, 5, 6], id="every step"),
        pytest.param(3, 1, [3, 4, 5, 6], id="from step 3"),
        pytest.param(3, 2, [4, 6], id="every 2 steps from step 3"),
        pytest.param(2, every(4) | at(1, 5), [4, 5], id="every 4 steps and at step 5"),
        pytest.param(6, every(epochs=1), [6], id="at the end of the epoch"),
    ],
)
def test_due_steps_from_start_on_are_counted(start, when, counted):
    points = [1000, 1, 20, 300, 7, 50, 6]
    swa = SWA(start=start, when=when)
    result = run(swa, points)
    assert float(swa.params(result)) == pytest.approx(np.mean([points[step] for step in counted]), rel=1e-6)
    assert result.carry(swa).count == len(counted)


def test_default_counts_the_weights_at_the_end_of_each_epoch():
    swa = SWA(start=3)
    result = Engine(follow, [swa]).run(
        {"params": 0.0}, lambda epoch: [[9.0, 9.0], [2.0, 4.0], [9.0, 8.0]][epoch], steps=6, epoch_steps=2
    )
    assert swa.params(result) == 6.0


def test_weights_before_the_first_point_leave_no_trace():
    swa = SWA(start=2, when=1)
    assert swa.params(run(swa, [7, np.nan, 0.1])) == np.float32(0.1)


@pytest.mark.parametrize("start", [3, 100])
def test_current_weights_are_returned_before_the_first_point(start):
    swa, seen = SWA(start=start, when=3), []
    engine = Engine(follow, [swa])
    engine.on("run_begin")(lambda loop: seen.append(float(swa.params(loop))))
    engine.on("step_end")(lambda loop: seen.append(float(swa.apply(loop)["params"])))
    engine.run({"params": 5.0}, [7.0, 8.0], epochs=1)
    assert seen == [5.0, 7.0, 8.0]


def test_apply_returns_a_copy_of_the_state_with_the_mean():
    swa = SWA(start=0, when=1, of="gen.params")
    state = {"gen": {"params": {"w": 0.0}}, "count": 0}

    def grow(state, batch):
        return {"gen": {"params": {"w": state["gen"]["params"]["w"] + batch}}, "count": state["count"] + 1}, {}

    result = Engine(grow, [swa]).run(state, [2, 2], epochs=1)
    assert swa.apply(result) == {"gen": {"params": {"w": 3.0}}, "count": 2}
    assert result.state == {"gen": {"params": {"w": 4.0}}, "count": 2}


def test_averaged_nnx_model_can_be_merged():
    graph, state = nnx.split(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
    swa = SWA(start=0, when=1, of=None)
    state = jax.tree.map(jnp.zeros_like, state)
    result = Engine(lambda s, b: (jax.tree.map(lambda x: x + b, s), {}), [swa]).run(state, [2.0, 2.0], epochs=1)
    assert nnx.merge(graph, swa.apply(result))(jnp.ones((1, 2))) == 6.0


def test_leaves_that_are_not_floats_are_copied_from_the_last_point():
    def count(state, batch):
        return {"params": {"n": state["params"]["n"] + 1, "key": state["params"]["key"]}}, {}

    swa = SWA(start=0, when=2)
    result = Engine(count, [swa]).run({"params": {"n": 0, "key": jax.random.key(3)}}, [0] * 5, epochs=1)
    assert swa.params(result) == {"n": 4, "key": jax.random.key(3)}


def test_16_bit_weights_are_averaged_in_32_bits():
    swa = SWA(start=0, when=1)
    data = [jnp.bfloat16(point) for point in (1, 1, 1, 1 + 2**-7)]
    result = Engine(follow, [swa]).run({"params": jnp.bfloat16(0)}, data, epochs=1)
    assert float(result.carry(swa).average) == 1 + 2**-9
    assert swa.params(result).dtype == jnp.bfloat16


def test_evaluate_can_use_the_mean():
    swa = SWA(start=0, when=1)
    look = Evaluate(lambda state, batch: {"w": state["params"]}, [0], using=swa, when=1)
    result = Engine(follow, [swa, look]).run({"params": 0.0}, [2.0, 4.0, 9.0], epochs=1)
    assert result.history["val/w"] == [2.0, 3.0, 5.0]


@pytest.mark.parametrize("when", [1, 2, every(epochs=1)], ids=repr)
def test_resumed_run_ends_in_the_same_bytes(when):
    points = list(np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32))
    swa = SWA(start=2, when=when)
    engine = Engine(follow, [swa])
    whole = engine.run({"params": points[0]}, points, steps=13, epoch_steps=4)
    parts = engine.run({"params": points[0]}, points, steps=5, epoch_steps=4)
    parts = engine.run(parts, points, steps=13, epoch_steps=4)
    assert swa.params(whole).tobytes() == swa.params(parts).tobytes()
    assert not np.array_equal(swa.params(whole), whole.state["params"])


def test_mean_does_not_change_the_run():
    data = [np.float32(x) / 7 for x in range(5)]
    step = Engine(lambda state, batch: ({"params": state["params"] * batch + 1}, {}), [SWA(start=0, when=1)])
    plain = Engine(lambda state, batch: ({"params": state["params"] * batch + 1}, {}))
    assert step.run({"params": 3.0}, data, epochs=1).state == plain.run({"params": 3.0}, data, epochs=1).state


@pytest.mark.parametrize("options", [{"jit": False}, {"steps_per_call": 4}], ids=["uncompiled", "in blocks"])
def test_mean_is_the_same_in_every_execution_mode(options):
    means = []
    for how in ({"steps_per_call": 1}, options):
        swa = SWA(start=2, when=2)
        means.append(swa.params(run(swa, [3, 1, 4, -1, 5], **how)))
    assert means == [4.5, 4.5]


def test_mean_shares_no_buffer_with_the_state():
    shared = []

    class Compare(Callback):
        def on_step_end(self, loop):
            state, carry = jax.tree.leaves(loop.state), jax.tree.leaves(loop.carries)
            shared.append({x.unsafe_buffer_pointer() for x in state} & {x.unsafe_buffer_pointer() for x in carry})

    state = {"w": jnp.ones(100), "n": jnp.arange(100)}
    Engine(lambda s, b: (s, {}), [SWA(start=2, of=None, when=1), Compare()]).run(state, [0] * 4, epochs=1)
    assert shared == [set()] * 4


def test_cadence_in_epochs_of_unknown_length_raises():
    with pytest.raises(ValueError, match="SWA.update is due every.epochs=1., so the length of an epoch must be known"):
        Engine(follow, [SWA(start=0)]).run({"params": 0.0}, lambda epoch: iter([1.0, 2.0]), epochs=1)


def test_unknown_field_raises_an_error_that_lists_the_fields():
    with pytest.raises(ValueError, match=r"SWA needs 'params' in the state, but dict has \['weights'\]"):
        Engine(follow, [SWA(start=0, when=1)]).run({"weights": 1.0}, [1.0], epochs=1)


@pytest.mark.parametrize("start", [-1, 1.5, None])
def test_start_out_of_range_raises(start):
    with pytest.raises(ValueError, match=f"SWA needs start to be a whole number >= 0, got {start}"):
        SWA(start=start)


class DictSWA(SWA):
    """Keeps its carry in a dict, as version 0.1 did."""

    def init(self, state):
        return super().init(state)._asdict()

    def update(self, carry, ctx):
        carry, ctx = super().update(SwaCarry(**carry), ctx)
        return carry._asdict(), ctx


def test_checkpoint_of_version_0_1_resumes_to_the_same_bytes(tmp_path):
    def run(swa, steps, *callbacks):
        data = [np.float32([n, 1]) / 7 for n in range(4)]
        return Engine(follow, [swa, *callbacks]).run({"params": jnp.zeros(2)}, data, steps=steps)

    def swa(kind):
        return kind(start=1, when=1, name="SWA")

    whole = run(swa(SWA), 4)
    run(swa(DictSWA), 2, Checkpoint(tmp_path, when=2))
    resumed = run(swa(SWA), 4, Checkpoint(tmp_path, when=2))
    assert same_bytes(resumed.snapshot.tree, whole.snapshot.tree)
    assert signature(resumed.snapshot.tree["carries"]) == {"SWA/average": "float32[2]", "SWA/count": "int32[]"}


@pytest.mark.parametrize(
    ("swa", "text"),
    [
        pytest.param(SWA(start=100), "SWA(start=100)", id="defaults"),
        pytest.param(SWA(start=0, of=None, when=5), "SWA(start=0, of=None, when=5)", id="more"),
    ],
)
def test_repr_reads_like_the_call(swa, text):
    assert repr(swa) == text
