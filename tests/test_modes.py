"""Every compiled half, evaluation and the means under JAX's other modes, with every kind of leaf in the state.

The numbers are powers of two and their sums, so that every mode must give the same values exactly.
"""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import (
    EMA,
    SWA,
    ClipWeights,
    Evaluate,
    GradNorm,
    Histograms,
    LearningRate,
    NaNGuard,
    Summary,
    Target,
)

MODES = {
    "standard": contextlib.nullcontext,
    "x64": functools.partial(jax.enable_x64, True),
    "strict promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "transfer guard": functools.partial(jax.transfer_guard, "disallow"),
    "jit disabled": jax.disable_jit,
}
SLOW = {"jit disabled": pytest.mark.slow}
"""Each operation is compiled alone."""
LEAVES = {
    "float32": np.float32([8, -4]),
    "bfloat16": np.array([8, 4], ml_dtypes.bfloat16),
    "float8": np.array([8, 4], ml_dtypes.float8_e4m3fn),
    "complex64": np.complex64([8 + 2j, 4]),
    "int32": np.int32(3),
    "int4": np.array([1, 2], ml_dtypes.int4),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 2), np.float32),
}
WIDE = {"float64": np.float64([8, -4]), "int64": np.int64(3), "complex128": np.complex128(8 + 2j)}
KEY = jax.random.key(1)


def callbacks(directory):
    """Return every callback with a compiled half, and those that compute between steps; what undoes steps is first."""
    return [
        NaNGuard(skip=True, max_skips=2, when=1, name="skip"),
        NaNGuard(state=True, when=1),
        EMA(0.5),
        EMA(0.5, warmup=1, start=1, of=None, name="warm"),
        SWA(start=2, when=1),
        GradNorm(by_module=True, updates=True, params=True, when=2),
        Histograms(directory, grads=True, when=2),
        Target(rate=0.5, when=2),
        ClipWeights(-3, 3, of="target"),
        LearningRate(lambda count: jnp.where(count > 0, 0.25, 0.5), of="opt"),
        Summary(stats=True, file=io.StringIO()),
        Evaluate(lambda state, batch, rng: {"size": batch.sum()}, [jax.device_put(np.float32([1, 2]))]),
    ]


def halve(state, batch):
    """Halve the floats. The gradients are the parameters before the step."""

    def half(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (leaf.astype(jnp.float32) * 0.5).astype(leaf.dtype)

    new = {**state, "params": jax.tree.map(half, state["params"]), "opt": {"count": state["opt"]["count"] + 1}}
    return new, {"loss": batch.sum()}, {"grads": state["params"]}


def outcome(mode, leaves, directory, **options):
    """Return everything that a run of three steps computes in a mode, by name."""
    made = callbacks(directory)
    with MODES[mode]():
        params = {
            "net": jax.device_put({name: LEAVES[name] for name in leaves} | (WIDE if mode == "x64" else {})),
            "key": KEY,
        }
        state = dict.fromkeys(("params", "target"), params)
        state["opt"] = {"count": jax.device_put(np.int32(0))}
        data = [jax.device_put(np.float32([n, 1])) for n in range(3)]
        result = Engine(halve, made, log_every=2, **options).run(state, data, epochs=1, rng=KEY)
        got = {"state": result.state, "carries": result.snapshot.tree["carries"], "latest": dict(result.latest)}
        got["averages"] = [callback.apply(result) for callback in made if hasattr(callback, "apply")]
    return {jax.tree_util.keystr(path): described(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(got)}


def described(leaf):
    """Return the dtype and the values of a leaf."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).dtype.name, np.asarray(leaf).tolist()


@functools.cache
def expected(leaves, directory):
    return outcome("standard", leaves, directory, steps_per_call=1)


ALL_LEAVES = ("norm", "NaNGuard", "skip", "Histograms")
"""Values that are computed from all leaves, so those of 64 bits change them."""


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=SLOW.get(mode, ())) for mode in MODES])
@pytest.mark.parametrize(
    "leaves",
    [
        pytest.param(("float32",), id="float32"),
        pytest.param((*LEAVES,), id="all kinds of leaves", marks=pytest.mark.slow),
    ],
)
def test_mode_changes_no_value_of_any_kind_of_leaf(leaves, mode, tmp_path_factory):
    want = expected(leaves, str(tmp_path_factory.getbasetemp() / "standard"))
    got = outcome(mode, leaves, str(tmp_path_factory.mktemp("events")), steps_per_call=4)
    if mode == "x64":
        want = {path: value for path, value in want.items() if not any(name in path for name in ALL_LEAVES)}
    assert {path: got[path] for path in want} == want


def test_warm_up_of_a_float64_average_is_exact():
    points = np.random.default_rng(0).normal(size=6)
    with jax.enable_x64(True):
        ema = EMA(0.9, warmup=3)
        engine = Engine(lambda state, batch: ({"params": batch}, {}), [ema])
        result = engine.run({"params": points[0]}, list(points[1:]), epochs=1)
        average = ema.params(result)
    expected = points[0]
    for n, point in enumerate(points[1:], 1):
        decay = min(0.9, n / (n + 3))
        expected = decay * expected + (1 - decay) * point
    assert average.dtype == np.float64
    assert float(average) == pytest.approx(expected, rel=1e-15)


def test_disabled_jit_acts_as_jit_false_for_the_run_that_begins_there():
    def read(state, batch):
        seen.append(float(batch.sum()))
        return state + 1, {"loss": batch.sum()}

    def measure(state, batch):
        seen.append(float(batch.at[0].get()))  # numpy's arrays have no `at`
        return {"x": batch.sum()}

    seen = []
    engine = Engine(read, [Evaluate(measure, [np.float32([5])])], steps_per_call=4)
    with jax.disable_jit():
        result = engine.run(0, [np.float32([n]) for n in (1, 2)], epochs=1)
    assert seen == [1, 2, 5]
    assert (int(result.state), result.latest["val/x"], result.latest["epoch/loss"]) == (2, 5, 1.5)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        engine.run(0, [np.float32([1])], epochs=1)
    with jax.disable_jit():  # a Result of either mode can be continued
        assert engine.plan(0, [1]).steps_per_call in (None, 1)
        assert int(engine.run(result, [np.float32([n]) for n in (1, 2)], epochs=2).state) == 4
