"""CSV: files read back with csv and numpy."""

import csv
import math

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine
from onstep.callbacks import CSV
from onstep.testing import LogValues, counting_step


def validation():
    """Logs at every third step."""
    return LogValues({step: {"val/acc": step / 10, 'a "b", c': 1.0} for step in (3, 6)})


def run(path, *callbacks, start=0.0, **to):
    start = jnp.float32(start) if isinstance(start, float) else start
    return Engine(counting_step, [*callbacks, CSV(path)], log_every=1).run(start, [1.0, 2.0, 3.0, 4.0], **to)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_is_one_row_with_all_its_values(tmp_path):
    run(tmp_path / "log.csv", validation(), epochs=1)
    assert rows(tmp_path / "log.csv")[2:] == [
        {"step": "3", "epoch": "0", "train/loss": "3.0", "val/acc": "0.3", 'a "b", c': "1.0", "epoch/loss": ""},
        {"step": "4", "epoch": "1", "train/loss": "4.0", "val/acc": "", 'a "b", c': "", "epoch/loss": "2.5"},
    ]


def test_earlier_rows_are_empty_in_a_new_column(tmp_path):
    run(tmp_path / "log.csv", validation(), epochs=2)
    assert list(rows(tmp_path / "log.csv")[0]) == ["step", "epoch", "train/loss", "val/acc", 'a "b", c', "epoch/loss"]
    assert [row["val/acc"] for row in rows(tmp_path / "log.csv")] == ["", "", "0.3", "", "", "0.6", "", ""]
    assert not list(tmp_path.glob("*.tmp"))


def test_numpy_reads_values_that_are_not_finite(tmp_path):
    values = [1.0, math.nan, math.inf, -math.inf]
    Engine(counting_step, [CSV(tmp_path / "log.csv")], log_every=1).run(jnp.float32(0), values, epochs=1)
    table = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True, deletechars="")
    np.testing.assert_equal(table["train/loss"], values)
    assert table["step"].tolist() == [1, 2, 3, 4]


def test_row_is_on_disk_when_its_step_ends(tmp_path):
    engine = Engine(counting_step, [CSV(tmp_path / "log.csv")], log_every=1)
    with engine.steps(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1) as steps:
        counts = [len(rows(tmp_path / "log.csv")) for _ in steps]
    assert counts == [1, 2, 3]


def test_last_value_wins_if_a_name_is_logged_twice_at_a_step(tmp_path):
    engine = Engine(counting_step, [CSV(tmp_path / "log.csv")])
    engine.on("step_end")(lambda loop: [loop.log({"a": value}) for value in (1.23456, 2.0)])
    engine.run(jnp.float32(0), [1.0, 2.0], steps=2)
    assert [(row["step"], row["a"]) for row in rows(tmp_path / "log.csv")] == [("1", "2.0"), ("2", "2.0")]


def test_resumed_run_removes_later_rows_and_an_incomplete_row(tmp_path):
    path = tmp_path / "log.csv"
    first = run(path, steps=2)
    with path.open("a") as file:
        file.write("3,0,9.0\n1")  # the beginning of row 10, for example
    run(path, validation(), start=first, steps=4)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "4.0"),
    ]  # fmt: skip


def test_values_logged_before_the_first_step_of_a_resumed_run_join_the_last_row(tmp_path):
    path = tmp_path / "log.csv"
    first = run(path, steps=2)
    engine = Engine(counting_step, [CSV(path)], log_every=1)
    engine.on("run_begin")(lambda loop: loop.log({"val/acc": 0.5}))
    engine.run(first, [1.0, 2.0, 3.0, 4.0], steps=3)
    read = [(row["step"], row["train/loss"], row["val/acc"]) for row in rows(path)]
    assert read == [("1", "1.0", ""), ("2", "2.0", "0.5"), ("3", "3.0", "")]


def test_file_of_another_run_is_renamed(tmp_path, capsys):
    run(tmp_path / "log.csv", steps=1)
    run(tmp_path / "log.csv", steps=2)
    assert [len(rows(tmp_path / name)) for name in ("log.1.csv", "log.csv")] == [1, 2]
    assert "was written by another run" in capsys.readouterr().err


def test_reserved_name_is_refused(tmp_path):
    engine = Engine(counting_step, [CSV(tmp_path / "log.csv")])
    engine.on("step_end")(lambda loop: loop.log({"step": 1.0}))
    with pytest.raises(
        ValueError, match=r"CSV reserves the names \['epoch', 'step'\], got values for \['step'\]. Log these"
    ):
        engine.run(jnp.float32(0), [1.0], epochs=1)
    assert not any(tmp_path.iterdir())
