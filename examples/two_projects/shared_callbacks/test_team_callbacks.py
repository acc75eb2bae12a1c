"""Tests of the package; run `pytest` in this folder."""

import jax
import jax.numpy as jnp
import pytest
from onstep import Engine
from onstep.testing import same_bytes
from team_callbacks import SkipSpikes


def step(state, batch):
    """Count the steps that are not skipped; the batch is the loss."""
    return state + 1, {"loss": jnp.float32(batch)}


def run(callback, losses):
    engine = Engine(step, [callback], log_every=1)
    return engine.run(jnp.int32(0), losses, epochs=1)


def test_spike_is_skipped_and_counted():
    skip = SkipSpikes(warmup=3)
    result = run(skip, [1.0, 1.1, 0.9, 1.0, 50.0, 1.0, 50.0])
    assert (int(result.state), skip.skipped(result)) == (5, 2)
    assert result.history["skipped"] == [0, 0, 0, 0, 1, 1, 2]


def test_loss_within_the_width_is_not_skipped():
    losses = [1.0, 1.1, 0.9, 1.3]  # mean 1, deviation 0.0816
    assert int(run(SkipSpikes(warmup=3, width=4), losses).state) == 4
    assert int(run(SkipSpikes(warmup=3, width=3), losses).state) == 3


@pytest.mark.parametrize("loss", [jnp.nan, jnp.inf])
def test_nonfinite_loss_is_skipped_even_during_warmup(loss):
    skip = SkipSpikes(warmup=10)
    result = run(skip, [1.0, loss, 1.0])
    assert (int(result.state), skip.skipped(result)) == (2, 1)
    assert jnp.isfinite(result.carry(skip)["mean"])


def test_mean_and_deviation_ignore_skipped_steps():
    skip = SkipSpikes(warmup=2, decay=0.5)
    result = run(skip, [1.0, 3.0, 1e6, 2.0])
    assert result.carry(skip)["mean"] == pytest.approx(2.0)  # (1 + 3) / 2, then 2 / 2 + 2 / 2
    assert result.carry(skip)["square"] == pytest.approx(4.5)


def test_loss_that_stays_high_stops_the_run():
    result = run(SkipSpikes(warmup=3, patience=4), [1.0, 1.1, 0.9] + [9.0] * 10)
    assert result.step == 7
    assert result.stopped == "the loss of the last 4 steps was too high"


def test_random_keys_in_the_state_are_restored():
    def keyed(state, batch):
        return jax.random.fold_in(state, 1), {"loss": jnp.float32(batch)}

    key = jax.random.key(0)
    result = Engine(keyed, [SkipSpikes()]).run(key, [jnp.nan], epochs=1)
    assert same_bytes(result.state, key)
