"""Files of records: an interrupted and resumed run writes the same as an uninterrupted one."""

import errno
import io
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, Record, every, processes, record_files
from onstep.callbacks import (
    CSV,
    Checkpoint,
    Evaluate,
    Images,
    JSONLines,
    MLflow,
    Summary,
    Table,
    TensorBoard,
    WandB,
    Writer,
)
from onstep.testing import RaiseIn, Restore, counting_step
from onstep.tools import RecordFile, replace_file

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


def engine(directory, *callbacks):
    """Return an engine that logs every 2 steps, evaluates every 5 and saves every 3."""

    def step(state, batch):
        return state + batch, {"loss": 1 / (state + batch)}

    def evaluation(state, batch):
        return {"sum": (state + batch).sum()}

    evaluate = Evaluate(evaluation, [jnp.ones(2)], when=every(5))
    files = [JSONLines(f"{directory}/log.jsonl", config={"rate": 1}), CSV(f"{directory}/log.csv")]
    return Engine(step, [*callbacks, evaluate, *files, Checkpoint(f"{directory}/run", when=3)], log_every=2)


def written(directory):
    """Return the lines of JSON without their times, and the bytes of the CSV file."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line | {"time": 0} for line in lines], (directory / "log.csv").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What an uninterrupted run of three epochs writes."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    engine(directory).run(jnp.float32(0), BATCHES, epochs=3)
    return written(directory)


@pytest.mark.parametrize("event", ["step_end", "save"])
@pytest.mark.parametrize("step", [2, 4, 5, 9, 12])
def test_run_interrupted_at_any_step_writes_the_same_points_as_an_uninterrupted_one(
    tmp_path, uninterrupted, step, event
):
    for error_step in (step, min(step + 2, 12)):
        error = RaiseIn(event, OSError("interrupted"), step=error_step)
        with pytest.raises(OSError, match="interrupted"):
            engine(tmp_path, error).run(jnp.float32(0), BATCHES, epochs=3)
    engine(tmp_path).run(jnp.float32(0), BATCHES, epochs=3)
    assert written(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 8])
def test_run_killed_while_it_writes_ends_with_the_same_points(tmp_path, uninterrupted, step):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    where = {"cwd": __file__.rsplit("/", 1)[0], "timeout": 120, "capture_output": True}
    assert subprocess.run([*command, str(step)], **where).returncode == -9
    with (tmp_path / "log.csv").open("a") as file:
        file.write("9,0,0.")  # an incomplete line
    assert subprocess.run([*command, "-1"], **where).returncode == 0
    assert written(tmp_path) == uninterrupted


@pytest.mark.parametrize("kind", [JSONLines, CSV, TensorBoard, MLflow, WandB], ids=lambda kind: kind.__name__)
def test_only_process_0_writes(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.setattr(processes, "writes", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Engine(lambda state, batch: (state, {"loss": batch}), [kind("here"), Table()]).run(0, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_file_keeps_its_old_content_if_an_error_occurs_while_it_is_replaced(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old\n")

    def lines():
        yield "new\n"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(str(path), lines())
    assert path.read_text() == "old\n"
    replace_file(str(path), ["new\n"]).close()
    assert path.read_text() == "new\n"


@pytest.mark.parametrize("kind", [JSONLines, CSV])
@pytest.mark.parametrize("start", [0, 1], ids=["from scratch", "resumed"])
def test_record_after_the_file_was_closed_removes_no_line(tmp_path, kind, start):
    class LogAtEnd(Callback):
        """Callbacks end in reverse order, so the first one in the list logs when the others have closed their files."""

        def on_run_end(self, loop):
            loop.log({"end": 0.5})

    first = Engine(counting_step, log_every=1).run(jnp.float32(0), BATCHES, steps=start)
    Engine(counting_step, [LogAtEnd(), Restore(first), kind(tmp_path / "log")], log_every=1).run(
        jnp.float32(0), BATCHES, steps=3
    )
    text = (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert [batch for batch in BATCHES if f" {batch}" in text or f",{batch}" in text] == BATCHES[start:3]
    assert "end" in text


@pytest.mark.parametrize("kind", [JSONLines, CSV])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_callback_whose_file_could_not_be_written_works_in_the_next_run(tmp_path, monkeypatch, kind, lasting):
    class File(io.FileIO):
        def write(self, data):
            nonlocal writes
            writes += 1
            if writes == 4 or (lasting and writes > 4):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def faulty(path, mode, *, encoding, newline):
        raw = File(path, mode.replace("r+", "rb+"))
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw) if "w" in mode else raw
        return io.TextIOWrapper(buffer, encoding=encoding, newline=newline)

    log = Engine(counting_step, [kind(tmp_path / "log.txt")], log_every=1)
    writes = 0
    monkeypatch.setattr(
        record_files, "open", lambda path, mode="r", **options: faulty(path, mode, **options), raising=False
    )
    with pytest.raises(OSError, match="No space left"):
        log.run(jnp.float32(0), BATCHES, epochs=1)
    monkeypatch.undo()
    assert log.run(jnp.float32(0), BATCHES, epochs=1).step == 4
    text = (tmp_path / "log.txt").read_text()
    assert all(f" {batch}" in text or f",{batch}" in text for batch in BATCHES)


def test_record_file_appends_replaces_and_returns_lines(tmp_path):
    file = RecordFile("Lines", tmp_path / "log", step=int)
    file.replace(["1\n", "2\n"])
    file.append("höhe\n")
    file.replace_last("3\n")
    file.append("4\n")
    assert file.lines() == ["1\n", "2\n", "3\n", "4\n"]
    file.append("5\n")
    file.close()
    assert not file.is_open
    assert (tmp_path / "log").read_text() == "1\n2\n3\n4\n5\n"


def test_record_file_that_is_not_open_refuses_lines(tmp_path):
    with pytest.raises(ValueError, match=r"Lines needs to call open\(loop\) before it uses .*log"):
        RecordFile("Lines", tmp_path / "log", step=int).append("1\n")


def test_record_file_refuses_values_under_reserved_names(tmp_path):
    file = RecordFile("Lines", tmp_path / "log", step=int, reserved=("step", "epoch"))
    file.check_names(Record(1, 0, {"train/step": 1.0}))
    with pytest.raises(ValueError, match=r"Lines reserves the names \['epoch', 'step'\], got values for \['step'\]"):
        file.check_names(Record(1, 0, {"step": 1.0}))


def draw(state):
    return {}


class Print:
    def write_scalars(self, step, scalars):
        print(step, scalars)

    def __repr__(self):
        return "Print()"


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (CSV("runs/log.csv"), "CSV('runs/log.csv')"),
        (JSONLines("log.jsonl", config={"token": "x"}), "JSONLines('log.jsonl', config={'token': '***'})"),
        (Table(), "Table()"),
        (Table(["loss"], best={"loss": "min"}, when=5), "Table(columns=['loss'], best={'loss': 'min'}, when=5)"),
        (TensorBoard("runs", config={"rate": 1}), "TensorBoard('runs', config={'rate': 1})"),
        (WandB("digits", tags=["a"], mode="offline"), "WandB(project='digits', tags=('a',))"),
        (MLflow("digits", tags={"team": "a"}), "MLflow(experiment='digits', tags={'team': 'a'})"),
        (MLflow(tracking_uri="https://me:pw@host"), "MLflow(tracking_uri='https://***@host')"),
        (Writer(Print(), name="print"), "Writer(Print(), name='print')"),
        (Images(draw, png="png", when=2), "Images(draw, png='png', when=2)"),
        (Summary(), "Summary()"),
        (Summary(None, stats=True), "Summary(of=None, stats=True)"),
    ],
    ids=str,
)
def test_repr_is_the_call_without_defaults_and_secrets(callback, text):
    assert repr(callback) == text
