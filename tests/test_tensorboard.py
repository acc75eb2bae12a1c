"""TensorBoard: event files read back with TensorBoard's own reader."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine, Snapshot
from onstep.callbacks import Checkpoint, TensorBoard
from onstep.testing import LogValues, RaiseIn, Restore, counting_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata


def validation():
    """Logs at every second step."""
    return LogValues({step: {"val/acc": step / 100} for step in range(2, 13, 2)})


def points(directory):
    """Return what TensorBoard shows: (step, value) in order, by name."""
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def recorded(*results):
    """Return the same from the results of runs."""
    joined = {}
    for result in results:
        for name, values in result.history.items():
            pairs = zip(result.history.steps(name), np.float32(values).tolist(), strict=True)
            joined.setdefault(name, []).extend(pairs)
    return joined


def test_every_recorded_point_is_written_once_at_its_step(tmp_path):
    engine = Engine(counting_step, [validation(), TensorBoard(tmp_path)], log_every=3)
    result = engine.run(jnp.float32(0), [0.1, 0.2, 0.3, 0.4], epochs=2)
    assert points(tmp_path) == recorded(result)
    assert result.history.steps("val/acc") == [2, 4, 6, 8]
    assert result.history.steps("train/loss") == [3, 6, 8]


def test_resumed_run_writes_no_duplicate_points(tmp_path):
    engine = Engine(counting_step, [validation(), TensorBoard(tmp_path)], log_every=3)
    first = engine.run(jnp.float32(0), [1, 2, 3, 4], epochs=1)
    second = engine.run(first, [1, 2, 3, 4], epochs=3)
    assert sorted(points(tmp_path)["train/loss"]) == sorted(recorded(first, second)["train/loss"])
    assert sorted(points(tmp_path)["val/acc"]) == sorted(recorded(first, second)["val/acc"])


def test_every_resumed_run_hides_later_points(tmp_path):
    saved = []
    engine = Engine(counting_step, [TensorBoard(tmp_path)], log_every=1)

    @engine.on("save")
    def save(loop):
        if loop.step == 5:
            snapshot = loop.snapshot()
            saved.append(Snapshot(snapshot.step, jax.tree.map(jnp.copy, snapshot.tree), snapshot.host))

    engine.run(jnp.float32(0), [0] * 8, epochs=1)
    for attempt in range(1, 6):
        again = Engine(counting_step, [Restore(saved[0]), TensorBoard(tmp_path)], log_every=1)
        again.run(jnp.float32(0), [attempt] * 8, epochs=1)
        expected = [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, attempt), (7, attempt), (8, attempt)]
        assert points(tmp_path)["train/loss"] == expected


def test_run_from_scratch_hides_the_points_of_an_earlier_run(tmp_path):
    _, second = (
        Engine(lambda state, batch, name=name: (state, {name: batch}), [TensorBoard(tmp_path)]).run(0, [1, 2], epochs=1)
        for name in ("a", "b")
    )
    assert {name: values for name, values in points(tmp_path).items() if values} == recorded(second)


def test_two_runs_within_one_second_lose_no_points(tmp_path):
    engine = Engine(counting_step, [TensorBoard(tmp_path)], log_every=1)

    @engine.on("epoch_end")
    def another(loop):
        inner = Engine(lambda state, batch: (state, {"inner": batch}), [TensorBoard(tmp_path)], log_every=1)
        inner.run(0, [4, 5, 6], epochs=1)

    engine.run(jnp.float32(0), [1, 2, 3], epochs=1)
    read = {}
    for number, file in enumerate(sorted(tmp_path.glob("events.*"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        file.rename(folder / file.name)
        read |= points(folder)
    assert read["train/loss"] == [(1, 1), (2, 2), (3, 3)]
    assert read["train/inner"] == [(1, 4), (2, 5), (3, 6)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_written_unchanged(tmp_path, value):
    batches = [1.0, value, 3.0]
    Engine(counting_step, [TensorBoard(tmp_path)], log_every=1).run(jnp.float32(0), batches, epochs=1)
    read = points(tmp_path)["train/loss"]
    assert [step for step, _ in read] == [1, 2, 3]
    np.testing.assert_equal([number for _, number in read], batches)


def test_run_that_fails_before_its_first_record_creates_no_file(tmp_path):
    engine = Engine(counting_step, [TensorBoard(tmp_path / "run"), RaiseIn("step_end", OSError("disk gone"))])
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.float32(0), [1, 1], epochs=1)
    assert not any(tmp_path.iterdir())


def test_run_that_fails_later_keeps_its_records(tmp_path):
    engine = Engine(counting_step, [TensorBoard(tmp_path), RaiseIn("epoch_end", OSError("disk gone"))], log_every=2)
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.float32(0), [1, 3, 5], epochs=1)
    assert points(tmp_path) == {"train/loss": [(2, 2)], "epoch/loss": [(3, 3)]}


def test_run_that_is_already_finished_creates_no_file(tmp_path):
    engine = Engine(counting_step, [TensorBoard(tmp_path)])
    first = engine.run(jnp.float32(0), [1, 1], epochs=1)
    before = list(tmp_path.iterdir())
    engine.run(first, [1, 1], epochs=1)
    assert list(tmp_path.iterdir()) == before


def test_rerun_of_a_finished_run_adds_its_last_record_only_if_it_is_missing(tmp_path):
    engine = Engine(counting_step, [TensorBoard(tmp_path / "board"), Checkpoint(tmp_path / "run")])
    engine.run(jnp.float32(0), [1, 1], epochs=1)
    (file,) = (tmp_path / "board").iterdir()
    engine.run(jnp.float32(0), [1, 1], epochs=1)
    assert list((tmp_path / "board").iterdir()) == [file]
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"train/loss") - 20])  # as if the run was killed while it wrote the record
    assert points(tmp_path / "board") == {"epoch/loss": [(2, 1.0)]}
    engine.run(jnp.float32(0), [1, 1], epochs=1)
    assert points(tmp_path / "board") == {"epoch/loss": [(2, 1.0)], "train/loss": [(2, 1.0)]}


def test_configuration_becomes_hyperparameters_and_its_secrets_are_in_no_file(tmp_path):
    config = {"optimizer": {"rate": 0.1, "kind": "adam", "clip": None}, "api_key": "sk-123", "url": "https://u:p@host"}
    engine = Engine(counting_step, [TensorBoard(tmp_path, config=config)])
    first = engine.run(jnp.float32(0), [1, 1], epochs=1)
    engine.run(first, [1, 1], epochs=2)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    content = reader.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()} == {
        "optimizer.rate": 0.1,
        "optimizer.kind": "adam",
        "optimizer.clip": "None",
        "api_key": "***",
        "url": "https://***@host",
    }
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-123" not in written
    assert b"u:p@" not in written


def test_two_directories_receive_the_same_points(tmp_path):
    boards = [TensorBoard(tmp_path / "a"), TensorBoard(str(tmp_path / "b"))]
    result = Engine(counting_step, boards).run(jnp.float32(0), [1, 2], epochs=2)
    assert points(tmp_path / "a") == points(tmp_path / "b") == recorded(result)
