"""MLflow as it is, with a store of files: what it holds afterwards."""

import math
import sys

import jax.numpy as jnp
import mlflow
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import Checkpoint, MLflow


def add(state, batch):
    return state + batch, {"loss": batch}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store that needs no database; MLflow wants to be asked for it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path}/store"


def engine(store, *callbacks, **options):
    return Engine(add, [*callbacks, MLflow("digits", tracking_uri=store, **options)], log_every=1)


def runs(store):
    """The runs of the experiment, oldest first."""
    client = mlflow.MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return sorted(found, key=lambda run: run.info.start_time)


def points(store, run, name="train/loss"):
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in history]


def test_every_recorded_point_is_logged_once_to_a_run_that_finished(store):
    result = engine(store, run_name="first", tags={"team": "a"}).run(
        jnp.float32(0), [1.0, math.nan, math.inf], epochs=1
    )
    (run,) = runs(store)
    assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "first", "a")
    np.testing.assert_equal(points(store, run), [(1, 1.0), (2, math.nan), (3, math.inf)])
    assert set(run.data.metrics) == set(result.history)


def test_the_configuration_is_flat_and_its_secrets_are_in_no_file(store, tmp_path):
    config = {f"layer{n}": {"width": n} for n in range(150)} | {"api_key": "sk-123", "url": "https://u:p@host"}
    engine(store, config=config).run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    expected = {f"layer{n}.width": str(n) for n in range(150)} | {"api_key": "***", "url": "https://***@host"}
    assert run.data.params == expected
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-123" not in written
    assert b"u:p@" not in written


@pytest.mark.parametrize("cut", [3, 4, 5, 6])
def test_a_run_that_goes_on_continues_the_same_run_without_double_points(store, tmp_path, cut):
    def make():
        return engine(store, Checkpoint(tmp_path / "run", when=2), config={"rate": 1})

    batches = [float(n) for n in range(8)]
    first = make()

    @first.on("step_end")
    def fail(loop):
        if loop.step == cut + 1:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        first.run(jnp.float32(0), batches, epochs=1)
    (run,) = runs(store)
    assert (run.info.status, points(store, run)) == ("FAILED", list(enumerate(batches[:cut], 1)))
    second = make()
    second.on("epoch_end")(lambda loop: during.append(runs(store)[0].info.status))
    during = []
    second.run(jnp.float32(0), batches, epochs=1)
    assert during == ["RUNNING"]
    (run,) = runs(store)
    assert (run.info.status, points(store, run)) == ("FINISHED", list(enumerate(batches, 1)))


def test_a_fresh_run_is_another_run(store):
    same = engine(store)
    for _ in range(2):
        same.run(jnp.float32(0), [1.0], epochs=1)
    assert [points(store, run) for run in runs(store)] == [[(1, 1.0)]] * 2


def test_a_run_that_is_stopped_to_be_resumed_or_interrupted_ends_as_killed(store):
    stopped, interrupted = engine(store), engine(store)
    stopped.on("step_end")(lambda loop: loop.stop("later", final=False))
    stopped.run(jnp.float32(0), [1.0, 2.0], epochs=1)

    @interrupted.on("epoch_end")
    def interrupt(loop):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.run(jnp.float32(0), [1.0, 2.0], epochs=2)
    assert [run.info.status for run in runs(store)] == ["KILLED", "KILLED"]


def test_a_record_of_more_names_than_mlflow_takes_at_once_is_logged_whole(store):
    log = engine(store)
    log.on("run_end")(lambda loop: loop.log({f"norm/{n}": 1.0 for n in range(1001)}))
    log.run(jnp.float32(0), [1.0], epochs=1)
    (run,) = runs(store)
    assert len(run.data.metrics) == 1003


def test_nothing_is_made_before_the_first_record(store, tmp_path):
    with pytest.raises(ValueError, match="yielded no batches"):
        engine(store).run(jnp.float32(0), [], epochs=1)
    assert not any(tmp_path.iterdir())


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"MLflow needs mlflow: pip install 'onstep\[mlflow\]'"):
        MLflow()
