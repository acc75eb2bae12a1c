"""The engine transfers nothing to the device implicitly: it runs under `jax.transfer_guard("disallow")`.

On CPUs only transfers to the device are guarded. On an accelerator the same test also shows that every read from the
device is deliberate. That nothing is read between due steps is shown in `test_device.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import BATCH, X, Y, evaluation, fresh_state, step
from onstep import Engine, every
from onstep.callbacks import (
    EMA,
    SWA,
    Checkpoint,
    ClipWeights,
    EarlyStopping,
    Evaluate,
    GracefulExit,
    GradNorm,
    Histograms,
    JSONLines,
    LearningRate,
    NaNGuard,
    Progress,
    Summary,
    TensorBoard,
    Timing,
)
from onstep.sharding import make_mesh


def on_device(number=0, put=jax.device_put):
    """Return the batches of an epoch, already on the device."""
    order = np.random.default_rng((0, number)).permutation(len(X)).reshape(-1, BATCH)
    return [put({"x": X[rows], "y": Y[rows]}) for rows in order]


def usual(directory, held_out):
    ema = EMA(0.9, warmup=2, when=every(2))
    return [
        GracefulExit(),
        NaNGuard(skip=True),
        ema,
        SWA(start=4),
        GradNorm(by_module=True, updates=True, when=3),
        Histograms(directory / "events", grads=True, when=7),
        ClipWeights(-9, 9, when=2),
        Evaluate(evaluation, held_out, using=ema),
        EarlyStopping("val/accuracy", patience=9, mode="max"),
        LearningRate(optax.cosine_decay_schedule(1e-2, 36)),
        Checkpoint(directory / "run", when=every(5)),
        TensorBoard(directory / "events"),
        JSONLines(directory / "records.jsonl"),
        Progress(interval=60),
        Summary(stats=True),
        Timing(),
    ]


@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"steps_per_call": 4}, {"prefetch": 2}], ids=str)
def test_run_with_the_usual_callbacks_makes_no_implicit_transfer(options, tmp_path):
    state, key, data = fresh_state(), jax.random.key(7), on_device()

    def run(steps):
        with jax.transfer_guard("disallow"):
            return Engine(step, usual(tmp_path, data), log_every=5, **options).run(state, data, steps=steps, rng=key)

    assert run(14).step == 14
    resumed = run(31)
    assert resumed.step == 31
    assert np.isfinite(resumed.latest["train/loss"])
    assert "val/accuracy" in resumed.latest


def test_run_on_a_mesh_makes_no_implicit_transfer(tmp_path):
    mesh = make_mesh(data=2, model=-1)
    put = jax.NamedSharding(mesh, jax.P("data"))
    data, key = on_device(put=lambda batch: jax.device_put(batch, put)), jax.random.key(7)
    engine = Engine(step, usual(tmp_path, data), log_every=5, mesh=mesh)
    state = jax.device_put(fresh_state(), jax.NamedSharding(mesh, jax.P()))
    with jax.transfer_guard("disallow"):
        assert engine.run(state, data, epochs=2, rng=key).step == 2 * len(data)


def test_number_in_the_state_is_transferred_explicitly():
    with jax.transfer_guard("disallow"):
        result = Engine(lambda state, batch: ({"n": state["n"] + batch}, {})).run(
            {"n": 0}, [jax.device_put(1)] * 3, epochs=1
        )
    assert int(result.state["n"]) == 3


def test_batch_on_the_host_is_the_transfer_of_the_user():
    engine = Engine(lambda state, batch: (state + batch, {}), steps_per_call=1)
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        engine.run(jnp.zeros(2), [np.ones(2, np.float32)], epochs=1)
