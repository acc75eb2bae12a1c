"""Event files: callbacks share one writer per run and directory, so they do not hide each other's points."""

import errno
import io
import os
import threading

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, at, event_files
from onstep.callbacks import Histograms, Images, TensorBoard
from onstep.tools import close_event_writer, event_writer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Write(Callback):
    """Writes the step number under a name, beginning with step `first`."""

    def __init__(self, directory, tag, first=1):
        self.directory, self.tag, self.first = directory, tag, first

    def on_step_end(self, loop):
        if loop.step >= self.first:
            event_writer(loop, self.directory).add_scalar(self.tag, loop.step, loop.step)

    def on_run_end(self, loop):
        close_event_writer(loop, self.directory)


def step(state, batch):
    return state + 1, {"loss": batch}


def steps(directory):
    """Return the steps at which TensorBoard shows points, by name."""
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [event.step for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_callbacks_that_begin_to_write_at_different_steps_share_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writers = [Write("runs", "a"), Write(tmp_path / "runs", "b", first=3), Write("./runs/", "c", first=2)]
    Engine(step, writers).run(0, [1.0] * 4, epochs=1)
    assert steps("runs") == {"a": [1, 2, 3, 4], "b": [3, 4], "c": [2, 3, 4]}
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_each_directory_has_its_own_file(tmp_path):
    Engine(step, [Write(tmp_path / "a", "x"), Write(tmp_path / "b", "y")]).run(0, [1.0] * 2, epochs=1)
    assert (steps(tmp_path / "a"), steps(tmp_path / "b")) == ({"x": [1, 2]}, {"y": [1, 2]})


def test_resumed_run_hides_later_points(tmp_path):
    first = Engine(step).run(0, [1.0] * 9, steps=2)
    for _ in range(2):
        Engine(step, [Write(tmp_path, "a"), Write(tmp_path, "b", first=4)]).run(first, [1.0] * 9, steps=5)
    assert steps(tmp_path) == {"a": [3, 4, 5], "b": [4, 5]}


def test_points_written_after_the_writer_was_closed_hide_nothing(tmp_path):
    class Late(Write):
        def on_run_end(self, loop):
            event_writer(loop, self.directory).add_scalar("late", 1, loop.step)
            close_event_writer(loop, self.directory)

    Engine(step, [Late(tmp_path, "a"), Write(tmp_path, "b")]).run(0, [1.0] * 2, epochs=1)
    assert steps(tmp_path) == {"a": [1, 2], "b": [1, 2], "late": [2]}


def test_file_exists_only_if_somebody_writes(tmp_path):
    Engine(step, [Write(tmp_path / "run", "a", first=9)]).run(0, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("board_first", [True, False])
def test_tensorboard_callback_shares_the_file(tmp_path, board_first):
    callbacks = [TensorBoard(tmp_path), Write(tmp_path, "a")]
    Engine(step, callbacks if board_first else callbacks[::-1], log_every=2).run(jnp.int32(0), [1.0] * 4, epochs=1)
    assert steps(tmp_path) == {"train/loss": [2, 4], "epoch/loss": [4], "a": [1, 2, 3, 4]}


class Faults:
    """Counts the operations on event files, and lets chosen ones fail."""

    def __init__(self, monkeypatch):
        self.count, self.failing = 0, ()
        monkeypatch.setattr(event_files, "open", self.open, raising=False)
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def operate(self):
        self.count += 1
        if self.count in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, path, mode):
        self.operate()

        class File(io.FileIO):
            def write(file, data):
                self.operate()
                return super().write(data)

        return io.BufferedWriter(File(path, mode))

    def fsync(self, number):
        self.operate()
        self._fsync(number)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", [TensorBoard, Histograms, Images])
def test_write_that_fails_is_an_error_and_the_next_run_is_complete(tmp_path, monkeypatch, kind, lasting):
    def add(state, batch):
        return {"params": state["params"] + batch}, {"loss": batch}

    monkeypatch.chdir(tmp_path)
    board = {
        TensorBoard: lambda: TensorBoard("run", flush_seconds=0),
        Histograms: lambda: Histograms("run"),
        Images: lambda: Images(lambda state: {"grey": jnp.full((2, 2, 1), state["params"][0])}, events="run"),
    }[kind]()
    engine, faults = Engine(add, [board], log_every=1), Faults(monkeypatch)

    def points():
        engine.run({"params": jnp.zeros(2)}, [1.0, 2.0], epochs=2)
        (file,) = sorted((tmp_path / "run").iterdir())[-1:]
        data = file.read_bytes()
        return {name: data.count(name) for name in (b"train/loss", b"params", b"grey")}

    expected = points()
    assert sum(expected.values()) in (2, 4)
    for operation in range(1, faults.count + 1):
        faults.count, faults.failing = 0, range(operation, 10**6) if lasting else (operation,)
        with pytest.raises(OSError, match="No space left"):
            points()
    faults.failing = ()
    assert points() == expected


def test_writer_that_its_user_closed_is_replaced(tmp_path):
    class Closes(Write):
        def on_step_end(self, loop):
            super().on_step_end(loop)
            event_writer(loop, self.directory).close()

    Engine(step, [Closes(tmp_path, "a"), TensorBoard(tmp_path)], log_every=1).run(0, [1.0] * 2, epochs=1)
    assert steps(tmp_path) == {"a": [1, 2], "train/loss": [1, 2], "epoch/loss": [2]}


def test_point_that_is_written_after_closing_has_failed_is_kept(tmp_path, monkeypatch):
    class Last(Write):
        def on_run_end(self, loop):
            event_writer(loop, self.directory).add_scalar("end", 1, loop.step)
            super().on_run_end(loop)

    def fail_once(file):
        if failing and failing.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    fsync, failing = os.fsync, []
    monkeypatch.setattr(os, "fsync", fail_once)
    engine = Engine(step, [Last(tmp_path, "a"), Write(tmp_path, "b")])  # the last one ends first
    engine.on("run_end")(lambda loop: failing.append(True))
    with pytest.raises(OSError, match="No space left"):
        engine.run(0, [1.0] * 2, epochs=1)
    assert steps(tmp_path) == {"a": [1, 2], "b": [1, 2], "end": [2]}


def test_no_thread_writes(tmp_path):
    before, during = set(threading.enumerate()), []
    engine = Engine(step, [Write(tmp_path, "a"), TensorBoard(tmp_path)])
    engine.on("run_end")(lambda loop: during.extend(threading.enumerate()))
    engine.run(0, [1.0] * 2, epochs=1)
    assert set(during) <= before


class Synced:
    """Records how much of the newest file is on disk."""

    def __init__(self, monkeypatch):
        self.bytes, fsync = 0, os.fsync

        def record(file):
            fsync(file)
            self.bytes = os.fstat(file).st_size

        monkeypatch.setattr(os, "fsync", record)

    def is_complete(self, directory):
        (file,) = directory.iterdir()
        return file.stat().st_size == self.bytes


def test_point_is_in_the_file_at_once_and_on_disk_when_the_run_ends(tmp_path, monkeypatch):
    synced, seen = Synced(monkeypatch), []
    engine = Engine(step, [Write(tmp_path, "a")])
    engine.on("step_end")(lambda loop: seen.append((steps(tmp_path)["a"], synced.is_complete(tmp_path))))
    engine.run(0, [1.0] * 2, epochs=1)
    assert seen == [([1], False), ([1, 2], False)]
    assert synced.is_complete(tmp_path)


def test_points_are_on_disk_as_often_as_requested(tmp_path, monkeypatch):
    synced, seen = Synced(monkeypatch), []
    engine = Engine(step, [TensorBoard(tmp_path, flush_seconds=0)], log_every=1)
    engine.on("step_end", when=at(2, 3))(lambda loop: seen.append(synced.is_complete(tmp_path)))
    engine.run(0, [1.0] * 3, epochs=1)
    assert seen == [True, True]
