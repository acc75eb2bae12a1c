"""A table for spreadsheets, read back with csv and numpy."""

import csv
import math

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine
from onstep.callbacks import CSV


class Validate(Callback):
    """Logs at every third step."""

    when = 3

    def on_step_end(self, loop):
        loop.log({"val/acc": loop.step / 10, 'a "b", c': 1.0})


def add(state, batch):
    return state + batch, {"loss": batch}


def run(path, *callbacks, start=0.0, **to):
    start = jnp.float32(start) if isinstance(start, float) else start
    return Engine(add, [*callbacks, CSV(path)], log_every=1).run(start, [1.0, 2.0, 3.0, 4.0], **to)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_step_is_one_row_with_all_that_was_recorded_at_it(tmp_path):
    run(tmp_path / "log.csv", Validate(), epochs=1)
    assert rows(tmp_path / "log.csv")[2:] == [
        {"step": "3", "epoch": "0", "train/loss": "3.0", "val/acc": "0.3", 'a "b", c': "1.0", "epoch/loss": ""},
        {"step": "4", "epoch": "1", "train/loss": "4.0", "val/acc": "", 'a "b", c': "", "epoch/loss": "2.5"},
    ]


def test_columns_that_come_later_leave_the_old_rows_empty(tmp_path):
    run(tmp_path / "log.csv", Validate(), epochs=2)
    assert list(rows(tmp_path / "log.csv")[0]) == ["step", "epoch", "train/loss", "val/acc", 'a "b", c', "epoch/loss"]
    assert [row["val/acc"] for row in rows(tmp_path / "log.csv")] == ["", "", "0.3", "", "", "0.6", "", ""]
    assert not list(tmp_path.glob("*.tmp"))


def test_numpy_reads_it_with_values_that_are_not_finite(tmp_path):
    values = [1.0, math.nan, math.inf, -math.inf]
    Engine(add, [CSV(tmp_path / "log.csv")], log_every=1).run(jnp.float32(0), values, epochs=1)
    table = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True, deletechars="")
    np.testing.assert_equal(table["train/loss"], values)
    assert table["step"].tolist() == [1, 2, 3, 4]


def test_a_row_is_on_disk_when_its_step_ends(tmp_path):
    engine = Engine(add, [CSV(tmp_path / "log.csv")], log_every=1)
    with engine.steps(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1) as steps:
        counts = [len(rows(tmp_path / "log.csv")) for _ in steps]
    assert counts == [1, 2, 3]


def test_a_value_recorded_twice_at_a_step_is_the_last_one(tmp_path):
    engine = Engine(add, [CSV(tmp_path / "log.csv")])
    engine.on("step_end")(lambda loop: [loop.log({"a": value}) for value in (1.23456, 2.0)])
    engine.run(jnp.float32(0), [1.0, 2.0], steps=2)
    assert [(row["step"], row["a"]) for row in rows(tmp_path / "log.csv")] == [("1", "2.0"), ("2", "2.0")]


def test_a_run_that_goes_on_cuts_what_lies_beyond_its_step_and_mends_a_torn_row(tmp_path):
    path = tmp_path / "log.csv"
    first = run(path, steps=2)
    with path.open("a") as file:
        file.write("3,0,9.0\n4,0,9")
    run(path, Validate(), start=first, steps=4)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "4.0"),
    ]  # fmt: skip


def test_what_a_run_that_goes_on_records_before_its_first_step_joins_the_row_there(tmp_path):
    path = tmp_path / "log.csv"
    first = run(path, steps=2)
    engine = Engine(add, [CSV(path)], log_every=1)
    engine.on("run_begin")(lambda loop: loop.log({"val/acc": 0.5}))
    engine.run(first, [1.0, 2.0, 3.0, 4.0], steps=3)
    read = [(row["step"], row["train/loss"], row["val/acc"]) for row in rows(path)]
    assert read == [("1", "1.0", ""), ("2", "2.0", "0.5"), ("3", "3.0", "")]


def test_another_runs_file_is_moved_aside(tmp_path, capsys):
    run(tmp_path / "log.csv", steps=1)
    run(tmp_path / "log.csv", steps=2)
    assert [len(rows(tmp_path / name)) for name in ("log.1.csv", "log.csv")] == [1, 2]
    assert "was written by another run" in capsys.readouterr().err


def test_a_record_with_a_name_that_the_row_needs_is_refused(tmp_path):
    engine = Engine(add, [CSV(tmp_path / "log.csv")])
    engine.on("step_end")(lambda loop: loop.log({"step": 1.0}))
    with pytest.raises(ValueError, match=r"CSV needs \['step'\] for itself. Record these values under other names."):
        engine.run(jnp.float32(0), [1.0], epochs=1)
    assert not any(tmp_path.iterdir())
