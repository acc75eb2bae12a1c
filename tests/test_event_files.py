"""Event files: one writer for a run and a directory, so that nobody hides what another has written."""

import threading

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, event_files
from onstep.callbacks import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Write(Callback):
    """Writes the step after each step under this name, from a step on."""

    def __init__(self, directory, tag, first=1):
        self.directory, self.tag, self.first = directory, tag, first

    def on_step_end(self, loop):
        if loop.step >= self.first:
            event_files.writer(loop, self.directory).add_scalar(self.tag, loop.step, loop.step)

    def on_run_end(self, loop):
        event_files.close(loop, self.directory)


def step(state, batch):
    return state + 1, {"loss": batch}


def steps(directory):
    """The steps at which TensorBoard shows points, by name."""
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [event.step for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_callbacks_that_begin_to_write_at_different_steps_share_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writers = [Write("runs", "a"), Write(tmp_path / "runs", "b", first=3), Write("./runs/", "c", first=2)]
    Engine(step, writers).run(0, [1.0] * 4, epochs=1)
    assert steps("runs") == {"a": [1, 2, 3, 4], "b": [3, 4], "c": [2, 3, 4]}
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_directories_are_apart(tmp_path):
    Engine(step, [Write(tmp_path / "a", "x"), Write(tmp_path / "b", "y")]).run(0, [1.0] * 2, epochs=1)
    assert (steps(tmp_path / "a"), steps(tmp_path / "b")) == ({"x": [1, 2]}, {"y": [1, 2]})


def test_a_run_that_goes_on_hides_what_was_written_beyond_its_step(tmp_path):
    first = Engine(step).run(0, [1.0] * 9, steps=2)
    for _ in range(2):
        Engine(step, [Write(tmp_path, "a"), Write(tmp_path, "b", first=4)]).run(first, [1.0] * 9, steps=5)
    assert steps(tmp_path) == {"a": [3, 4, 5], "b": [4, 5]}


def test_what_is_written_after_the_end_hides_nothing(tmp_path):
    class Late(Write):
        def on_run_end(self, loop):
            event_files.writer(loop, self.directory).add_scalar("late", 1, loop.step)
            event_files.close(loop, self.directory)

    Engine(step, [Late(tmp_path, "a"), Write(tmp_path, "b")]).run(0, [1.0] * 2, epochs=1)
    assert steps(tmp_path) == {"a": [1, 2], "b": [1, 2], "late": [2]}


def test_nothing_is_made_and_no_thread_stays_where_nobody_writes(tmp_path):
    before = set(threading.enumerate())
    Engine(step, [Write(tmp_path / "run", "a", first=9)]).run(0, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())
    Engine(step, [Write(tmp_path / "run", "a")]).run(0, [1.0], epochs=1)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("board_first", [True, False])
def test_the_scalars_of_tensorboard_share_the_file(tmp_path, board_first):
    callbacks = [TensorBoard(tmp_path), Write(tmp_path, "a")]
    Engine(step, callbacks if board_first else callbacks[::-1], log_every=2).run(jnp.int32(0), [1.0] * 4, epochs=1)
    assert steps(tmp_path) == {"train/loss": [2, 4], "epoch/loss": [4], "a": [1, 2, 3, 4]}
