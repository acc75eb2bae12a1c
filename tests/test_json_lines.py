"""JSONLines: files read back with a strict reader."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import Checkpoint, JSONLines
from onstep.callbacks.json_lines import read_json_lines
from onstep.testing import counting_step


def run(*callbacks, start=0.0, **to):
    start = jnp.float32(start) if isinstance(start, float) else start
    return Engine(counting_step, callbacks, log_every=1).run(start, [1.0, 2.0, 3.0, 4.0], **to)


def lines(path):
    """Return the lines, read without the constants that only Python allows."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_line_holds_step_epoch_time_and_values(tmp_path):
    run(JSONLines(tmp_path / "deep" / "log.jsonl"), epochs=1)
    first, *_, last = lines(tmp_path / "deep" / "log.jsonl")
    assert (first["step"], first["epoch"], first["train/loss"]) == (1, 0, 1.0)
    assert (last["step"], last["epoch"], last["epoch/loss"]) == (4, 1, 2.5)
    assert first["time"] <= last["time"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_a_string_that_float_reads(tmp_path, value):
    log = JSONLines(tmp_path / "log.jsonl")
    Engine(counting_step, [log], log_every=1).run(jnp.float32(0), [1.0, value], steps=2)
    read = lines(tmp_path / "log.jsonl")[1]["train/loss"]
    assert isinstance(read, str)
    np.testing.assert_equal(float(read), value)


def test_line_is_on_disk_when_its_step_ends(tmp_path):
    engine = Engine(counting_step, [JSONLines(tmp_path / "log.jsonl")], log_every=1)
    with engine.steps(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1) as steps:
        counts = [len(lines(tmp_path / "log.jsonl")) for _ in steps]
    assert counts == [1, 2, 4]


def test_resumed_run_removes_later_lines_and_an_incomplete_line(tmp_path):
    path = tmp_path / "log.jsonl"
    first = run(JSONLines(path), steps=2)
    with path.open("a") as file:
        file.write('{"step": 3, "epoch": 0, "time": 0, "train/loss": 9}\n{"step": 4, "ep')
    run(JSONLines(path), start=first, steps=4)
    assert [(line["step"], line["train/loss"]) for line in lines(path) if "train/loss" in line] == [
        (1, 1), (2, 2), (3, 3), (4, 4),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_file_of_another_run_is_renamed_with_a_message(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    for steps in (1, 2, 3):
        run(JSONLines(path), steps=steps)
    assert [len(lines(tmp_path / name)) for name in ("log.1.jsonl", "log.2.jsonl", "log.jsonl")] == [1, 2, 3]
    assert f"onstep: {path} was written by another run; renamed it to {tmp_path}/log.2.jsonl" in capsys.readouterr().err


def test_resumed_run_refuses_a_file_that_holds_something_else(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match=r"log.jsonl, line 1, is not a record: 'my notes'. Use another path."):
        run(JSONLines(path), start=run(steps=1), steps=2)
    assert path.read_text() == "my notes\n"


@pytest.mark.parametrize("loss", [1.5, math.nan])
def test_rerun_of_a_finished_run_adds_its_last_record_only_if_it_is_missing(tmp_path, loss):
    path = tmp_path / "log.jsonl"
    engine = Engine(counting_step, [JSONLines(path), Checkpoint(tmp_path / "run")])
    engine.run(jnp.float32(0), [loss] * 3, epochs=1)
    before = path.read_text()
    engine.run(jnp.float32(0), [loss] * 3, epochs=1)
    assert path.read_text() == before
    path.write_text(before.partition("\n")[0] + "\n")  # as if the run was killed before it wrote the record
    engine.run(jnp.float32(0), [loss] * 3, epochs=1)
    assert [line.keys() for line in lines(path)] == [json.loads(line).keys() for line in before.splitlines()]


def test_run_that_fails_before_its_first_record_creates_nothing(tmp_path):
    with pytest.raises(ValueError, match="yielded no batches"):
        Engine(counting_step, [JSONLines(tmp_path / "new" / "log.jsonl", config={"rate": 1})]).run(
            jnp.float32(0), [], epochs=1
        )
    assert not any(tmp_path.iterdir())


def test_configuration_is_written_first_and_again_only_if_it_changed(tmp_path):
    path = tmp_path / "log.jsonl"
    first = run(JSONLines(path, config={"rate": 0.1, "bound": math.inf, "token": "x"}), steps=1)
    second = run(JSONLines(path, config={"rate": 0.1, "bound": math.inf, "token": "y"}), start=first, steps=2)
    run(JSONLines(path, config={"rate": 0.2}), start=second, steps=3)
    expected = [{"config": {"rate": 0.1, "bound": "Infinity", "token": "***"}}, 1, 2, {"config": {"rate": 0.2}}, 3]
    assert [line.get("step", line) for line in lines(path)] == expected


def test_reserved_name_is_refused(tmp_path):
    engine = Engine(counting_step, [JSONLines(tmp_path / "log.jsonl")])
    engine.on("step_end")(lambda loop: loop.log({"time": 1.0}))
    with pytest.raises(
        ValueError,
        match=r"JSONLines reserves the names .*, got values for \['time'\]. Log these values",
    ):
        engine.run(jnp.float32(0), [1.0], epochs=1)


def test_all_sessions_are_read_as_one_history(tmp_path):
    path = tmp_path / "log.jsonl"
    first = run(JSONLines(path, config={"rate": 1}), epochs=1)
    run(JSONLines(path), start=first, epochs=2)
    history = read_json_lines(path)
    assert history["train/loss"] == [1, 2, 3, 4] * 2
    assert history.steps("epoch/loss") == [4, 8]
