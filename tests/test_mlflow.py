"""MLflow: what the real package stores in a file store."""

import math
import os
import sys

import jax.numpy as jnp
import mlflow
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import Checkpoint, MLflow
from onstep.testing import LogValues, RaiseIn, StopAt, counting_step


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return the address of a file store, which needs no database. MLflow requires an opt-in."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path}/store"


def engine(store, *callbacks, **options):
    return Engine(counting_step, [*callbacks, MLflow("digits", tracking_uri=store, **options)], log_every=1)


def runs(store):
    """Return the runs of the experiment, oldest first."""
    client = mlflow.MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return sorted(found, key=lambda run: run.info.start_time)


def points(store, run, name="train/loss"):
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in history]


def test_every_recorded_point_is_logged_once_to_a_finished_run(store):
    result = engine(store, run_name="first", tags={"team": "a"}).run(
        jnp.float32(0), [1.0, math.nan, math.inf], epochs=1
    )
    (run,) = runs(store)
    assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "first", "a")
    np.testing.assert_equal(points(store, run), [(1, 1.0), (2, math.nan), (3, math.inf)])
    assert set(run.data.metrics) == set(result.history)


def test_configuration_is_flat_and_its_secrets_are_in_no_file(store, tmp_path):
    config = {f"layer{n}": {"width": n} for n in range(150)} | {"api_key": "sk-123", "url": "https://u:p@host"}
    engine(store, config=config).run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    expected = {f"layer{n}.width": str(n) for n in range(150)} | {"api_key": "***", "url": "https://***@host"}
    assert run.data.params == expected
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-123" not in written
    assert b"u:p@" not in written


@pytest.mark.parametrize("cut", [3, 4, 5, 6])
def test_resumed_run_continues_the_same_mlflow_run_without_duplicate_points(store, tmp_path, cut):
    def make(*callbacks):
        return engine(store, Checkpoint(tmp_path / "run", when=2), *callbacks, config={"rate": 1})

    batches = [float(n) for n in range(8)]
    with pytest.raises(OSError, match="gone"):
        make(RaiseIn("step_end", OSError("gone"), step=cut + 1)).run(jnp.float32(0), batches, epochs=1)
    (run,) = runs(store)
    assert (run.info.status, points(store, run)) == ("FAILED", list(enumerate(batches[:cut], 1)))
    second = make()
    second.on("epoch_end")(lambda loop: during.append(runs(store)[0].info.status))
    during = []
    second.run(jnp.float32(0), batches, epochs=1)
    assert during == ["RUNNING"]
    (run,) = runs(store)
    assert (run.info.status, points(store, run)) == ("FINISHED", list(enumerate(batches, 1)))


def test_run_from_scratch_is_a_new_mlflow_run(store):
    same = engine(store)
    for _ in range(2):
        same.run(jnp.float32(0), [1.0], epochs=1)
    assert [points(store, run) for run in runs(store)] == [[(1, 1.0)]] * 2


def test_run_that_is_interrupted_or_stopped_to_be_resumed_ends_as_killed(store):
    engine(store, StopAt(1, final=False)).run(jnp.float32(0), [1.0, 2.0], epochs=1)
    with pytest.raises(KeyboardInterrupt):
        engine(store, RaiseIn("epoch_end", KeyboardInterrupt())).run(jnp.float32(0), [1.0, 2.0], epochs=2)
    assert [run.info.status for run in runs(store)] == ["KILLED", "KILLED"]


def test_record_with_more_names_than_the_limit_of_one_call_is_logged_completely(store):
    log = engine(store)
    log.on("run_end")(lambda loop: loop.log({f"norm/{n}": 1.0 for n in range(1001)}))
    log.run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    assert len(run.data.metrics) == 1003


def test_names_that_mlflow_does_not_allow_are_changed_and_stay_different(store):
    names = ["top@5", "top#5", "top_5", "timing(s)", "loss->", "a//b/../c", "/", "Größe 1:2", "x" * 300, "x" * 301]
    engine = Engine(
        lambda state, batch: (state, {}),
        [LogValues({1: {name: float(n) for n, name in enumerate(names)}}), MLflow("digits", tracking_uri=store)],
    )
    engine.run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    assert {name: run.data.metrics[name] for name in sorted(run.data.metrics, key=run.data.metrics.get)} == {
        "top_5": 0.0,
        "top_5_2": 1.0,
        "top_5_3": 2.0,
        "timing_s_": 3.0,
        "loss-_": 4.0,
        "a/b/c": 5.0,
        "_": 6.0,
        "Größe 1:2": 7.0,
        "x" * 250: 8.0,
        f"{'x' * 240}_2": 9.0,
    }


def test_parameter_names_that_mlflow_does_not_allow_are_changed(store):
    engine(store, config={"top@5": 1, "layer": {"a#b": 2}}).run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    assert run.data.params == {"top_5": "1", "layer.a_b": "2"}


def test_relative_directory_keeps_its_meaning_if_the_working_directory_changes(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run = engine("store")
    run.on("step_end")(lambda loop: os.chdir(tmp_path / "elsewhere"))
    run.run(jnp.float32(0), [1.0, 2.0], epochs=1)
    assert not any((tmp_path / "elsewhere").iterdir())
    assert points(store, *runs(store)) == [(1, 1.0), (2, 2.0)]


def test_nothing_is_created_before_the_first_record(store, tmp_path):
    with pytest.raises(ValueError, match="yielded no batches"):
        engine(store).run(jnp.float32(0), [], epochs=1)
    assert not any(tmp_path.iterdir())


def test_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ImportError, match=r"MLflow needs the package mlflow, which is not installed: pip install mlflow"
    ):
        MLflow()
