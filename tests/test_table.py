"""Table: the text that it prints."""

import io
import math

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, every
from onstep.callbacks import Table
from onstep.callbacks.table import HEADER_EVERY

ACCURACY = [0.5, 0.75, math.nan, 0.625, 0.875]


class Validate(Callback):
    """Logs an accuracy at the end of every second epoch."""

    name = "val"
    when = every(epochs=2)

    def on_step_end(self, loop):
        loop.log({"val/accuracy": ACCURACY[loop.epoch // 2 - 1], "time/x": 1.0})


def add(state, batch):
    return state + batch, {"loss": 100.0 / (state + 1)}


def shown(*callbacks, start=0.0, log_every=2, **options):
    """Return the text that a run prints, and its result."""
    to = options.pop("to", {"epochs": 4})
    file = io.StringIO()
    start = jnp.float32(start) if isinstance(start, float) else start
    engine = Engine(add, [*callbacks, Table(file=file, **options)], log_every=log_every)
    result = engine.run(start, [1.0, 2.0], **to)
    return file.getvalue(), result


def test_row_per_epoch_marks_the_best_value_so_far():
    text, _ = shown(Validate(), best={"val/accuracy": "max", "epoch/loss": "min"}, to={"epochs": 6})
    assert (
        text
        == """\
epoch     step  epoch/loss
    1        2      75.000*
epoch     step  epoch/loss   val/accuracy
    2        4      22.500*       0.50000*
    3        6      13.393*
    4        8      9.5455*       0.75000*
    5       10      7.4176*
    6       12      6.0662*           nan
"""
    )


def test_chosen_columns_are_shown_in_their_order_from_the_first_row():
    text, _ = shown(Validate(), columns=["val/accuracy", "train/loss"], to={"epochs": 2})
    assert (
        text
        == """\
epoch     step  val/accuracy   train/loss
    1        2                     75.000
    2        4       0.50000       22.500
"""
    )


def test_header_is_repeated_every_30_rows():
    text, _ = shown(columns=["epoch/loss"], to={"epochs": HEADER_EVERY + 1})
    rows = text.splitlines()
    assert [number for number, row in enumerate(rows) if row.startswith("epoch")] == [0, HEADER_EVERY + 1]


def test_rows_in_the_middle_of_an_epoch_show_window_means():
    text, _ = shown(when=2, log_every=1, to={"steps": 3})
    assert (
        text
        == """\
epoch     step  epoch/loss
    1        2      75.000
epoch     step  epoch/loss   train/loss
    1        3                   25.000
"""
    )


def test_resumed_run_knows_the_best_value_of_the_earlier_session():
    _, first = shown(Validate(), best={"val/accuracy": "max"}, to={"epochs": 4})
    text, _ = shown(Validate(), start=first, best={"val/accuracy": "max"}, to={"epochs": 10})
    marked = [row.split()[0] for row in text.splitlines() if "*" in row]
    assert marked == ["10"]


def test_table_prints_to_stdout_by_default(capsys):
    Engine(add, [Table()]).run(jnp.float32(0), [1.0, 2.0], epochs=1)
    assert capsys.readouterr().out.startswith("epoch     step  epoch/loss\n    1        2")


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="Table column 'loss' needs mode 'min' or 'max', got 'best'"):
        Table(best={"loss": "best"})


def test_one_string_as_columns_is_refused():
    with pytest.raises(ValueError, match=r"Table needs columns to be a list of names, got 'loss'\. Pass columns=\['lo"):
        Table("loss")


@pytest.mark.parametrize("options", [{"columns": ["epoch/lss"]}, {"best": {"epoch/lss": "min"}}], ids=["shown", "best"])
def test_name_that_was_never_recorded_is_a_warning(options):
    with pytest.warns(UserWarning, match=r"Table watches 'epoch/lss', but .* Did you mean epoch/loss\?"):
        shown(**options)
