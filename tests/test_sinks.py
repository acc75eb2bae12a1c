"""Runs that are cut and go on: their files hold the points of a run that was never cut."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, every, processes, sinks
from onstep.callbacks import CSV, Checkpoint, Evaluate, JSONLines, MLflow, Table, TensorBoard, WandB

SCRIPT = """
import os, signal, sys
from test_sinks import engine
run, kill = engine(sys.argv[1]), int(sys.argv[2])

@run.on("log")
def die(loop, record):
    if loop.step == kill:
        os.kill(os.getpid(), signal.SIGKILL)

import jax.numpy as jnp
from test_sinks import BATCHES
run.run(jnp.float32(0), BATCHES, epochs=3)
"""
BATCHES = [1.0, 2.0, 4.0, 8.0]


class Cut(Callback):
    """Fails at a step: before its records, or after them."""

    def __init__(self, step, late):
        self.step, self.late = step, late

    def on_step_end(self, loop):
        if loop.step == self.step and not self.late:
            raise OSError("cut")

    def on_save(self, loop):
        if loop.step == self.step and self.late:
            raise OSError("cut")


def engine(directory, *callbacks):
    """Three epochs of four steps: means of two, an evaluation every five, a checkpoint every three."""

    def step(state, batch):
        return state + batch, {"loss": 1 / (state + batch)}

    def look(state, batch):
        return {"sum": (state + batch).sum()}

    evaluate = Evaluate(look, [jnp.ones(2)], when=every(5))
    files = [JSONLines(f"{directory}/log.jsonl", config={"rate": 1}), CSV(f"{directory}/log.csv")]
    return Engine(step, [*callbacks, evaluate, *files, Checkpoint(f"{directory}/run", when=3)], log_every=2)


def written(directory):
    """The lines of JSON without their times, and the bytes of the table."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line | {"time": 0} for line in lines], (directory / "log.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    engine(directory).run(jnp.float32(0), BATCHES, epochs=3)
    return written(directory)


@pytest.mark.parametrize("late", [False, True], ids=["before its records", "before its save"])
@pytest.mark.parametrize("step", [2, 4, 5, 9, 12])
def test_a_run_cut_at_any_step_writes_the_same_points_as_one_that_was_not(tmp_path, whole, step, late):
    with pytest.raises(OSError, match="cut"):
        engine(tmp_path, Cut(step, late)).run(jnp.float32(0), BATCHES, epochs=3)
    with pytest.raises(OSError, match="cut"):  # once more, in the second sitting
        engine(tmp_path, Cut(min(step + 2, 12), late)).run(jnp.float32(0), BATCHES, epochs=3)
    engine(tmp_path).run(jnp.float32(0), BATCHES, epochs=3)
    assert written(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 8])
def test_a_run_that_is_killed_while_it_writes_does_so_too(tmp_path, whole, step):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    where = {"cwd": __file__.rsplit("/", 1)[0], "timeout": 120, "capture_output": True}
    assert subprocess.run([*command, str(step)], **where).returncode == -9
    with (tmp_path / "log.csv").open("a") as file:
        file.write("9,0,0.")  # torn in the middle of a write
    assert subprocess.run([*command, "-1"], **where).returncode == 0
    assert written(tmp_path) == whole


@pytest.mark.parametrize("sink", [JSONLines, CSV, TensorBoard, MLflow, WandB], ids=lambda sink: sink.__name__)
def test_only_process_0_writes(tmp_path, monkeypatch, capfd, sink):
    monkeypatch.setattr(processes, "writes", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Engine(lambda state, batch: (state, {"loss": batch}), [sink("here"), Table()]).run(0, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_a_rewritten_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old\n")

    def lines():
        yield "new\n"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sinks.rewrite(str(path), lines())
    assert path.read_text() == "old\n"
    sinks.rewrite(str(path), ["new\n"]).close()
    assert path.read_text() == "new\n"
