"""How far a run is: lines, or a bar in a terminal."""

import io
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine
from onstep.callbacks import Progress, progress


def add(state, batch):
    return state + batch, {"loss": batch}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock(Callback):
    """A clock on which every step takes so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def __call__(self):
        return self.now

    def on_step_begin(self, loop):
        self.now += self.seconds


@pytest.fixture
def clocked(monkeypatch):
    """Makes an engine, with Progress and other callbacks, whose steps take so many seconds."""

    def make(seconds, *callbacks, **options):
        clock = Clock(seconds)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
        engine = Engine(add, [clock, *callbacks], **options)
        engine._clock = clock
        return engine

    return make


def test_a_line_is_printed_at_each_interval_and_at_the_end(clocked):
    file = io.StringIO()
    clocked(4, Progress(interval=10, file=file)).run(jnp.int32(0), [1] * 7, epochs=1)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]


def test_a_line_says_step_epoch_rate_time_left_and_the_newest_metrics(clocked):
    file = io.StringIO()
    engine = clocked(30, Progress(interval=60, file=file), log_every=2)
    engine.run(jnp.int32(0), [1, 2, 3], epochs=2)
    assert file.getvalue().splitlines() == [
        "step 2/6  epoch 0/2  0.0333 steps/s  2:00 left",
        "step 4/6  epoch 1/2  0.0333 steps/s  1:00 left  train/loss 1.500",
        "step 6/6  epoch 2/2  0.0333 steps/s  train/loss 2.000",
        "step 6/6  epoch 2/2  0.0333 steps/s  train/loss 2.500",
    ]


def test_a_line_says_no_more_than_is_known(clocked):
    file = io.StringIO()
    clocked(0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(4)), epochs=1)
    assert file.getvalue() == "step 4  epoch 1/1  2 steps/s  train/loss 1.000\n"


def test_a_target_in_steps_is_the_total(clocked):
    file = io.StringIO()
    clocked(0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(9)), steps=4)
    assert file.getvalue() == "step 4/4  epoch 0  2 steps/s  train/loss 1.000\n"


def test_the_rate_counts_from_where_a_run_goes_on(clocked):
    file = io.StringIO()
    first = Engine(add).run(jnp.int32(0), [1] * 100, epochs=1)
    engine = clocked(2, Progress(interval=3, file=file))
    engine.run(first, [1] * 100, steps=104)
    assert [line.split("  ")[:4] for line in file.getvalue().splitlines()[:1]] == [
        ["step 102/104", "epoch 1", "0.5 steps/s", "0:04 left"]
    ]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (None, "val/acc 0.5000, train/loss 2.000"),
        (["train/loss"], "train/loss 2.000"),
        (["epoch/loss", "no"], "epoch/loss 2.000"),
    ],
    ids=["all but means of epochs", "one", "those that exist"],
)
def test_the_metrics_to_show_can_be_chosen(clocked, metrics, shown):
    file = io.StringIO()
    engine = clocked(1, Progress(file=file, metrics=metrics))
    engine.on("epoch_end")(lambda loop: loop.log({"val/acc": 0.5}))
    engine.run(jnp.int32(0), [1, 3], epochs=1)
    assert file.getvalue() == f"step 2/2  epoch 1/1  1 steps/s  {shown}\n"


def test_a_value_that_is_not_finite_is_shown_as_such(clocked):
    file = io.StringIO()
    clocked(1, Progress(file=file)).run(jnp.float32(0), [float("nan")], epochs=1)
    assert file.getvalue().endswith("train/loss nan\n")


def test_lines_go_to_stderr_by_default(capsys):
    Engine(add, [Progress()]).run(jnp.int32(0), [1, 1], epochs=1)
    captured = capsys.readouterr()
    assert captured.err.startswith("step 2/2  epoch 1/1")
    assert captured.out == ""


def test_a_run_that_fails_still_says_how_far_it_came(clocked):
    file = io.StringIO()
    engine = clocked(1, Progress(file=file))

    @engine.on("step_end")
    def fail(loop):
        if loop.step == 2:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert file.getvalue().startswith("step 2/3  epoch 0/1")


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
def test_nothing_is_printed_when_nothing_ran(terminal):
    file = Terminal() if terminal else io.StringIO()
    engine = Engine(add, [Progress(file=file)])
    assert file.getvalue() == ""
    first = Engine(add).run(jnp.int32(0), [1, 1], epochs=1)
    engine.run(first, [1, 1], epochs=1)
    assert file.getvalue() == ""


@pytest.mark.parametrize("interval", [0, -1.0])
def test_an_interval_that_is_not_positive_is_refused(interval):
    with pytest.raises(ValueError, match="seconds > 0"):
        Progress(interval=interval)


# The bar.


@pytest.fixture(autouse=True)
def _no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # tqdm would cut its lines there


def test_a_terminal_gets_a_bar_with_total_epoch_and_metrics():
    file = Terminal()
    Engine(add, [Progress(file=file)]).run(jnp.int32(0), [1, 2], epochs=3)
    first, *_, last = file.getvalue().rstrip("\n").split("\r")[1:]
    assert "0/6" in first
    assert last.startswith("epoch 3/3 6/6 |################| 00:00 left, ")
    assert last.endswith(" steps/s, train/loss 1.500")


def test_a_bar_shows_only_whole_values_evaluations_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    file = Terminal()
    engine = Engine(add, [Progress(file=file)])
    engine.on("step_end")(lambda loop: loop.log({"train/first": 1, "val/accuracy": 0.5, "test/very_long_name": 2}))
    engine.run(jnp.int32(0), [1, 2], epochs=3)
    last = file.getvalue().rstrip("\n").split("\r")[-1].rstrip()
    assert last.endswith("steps/s, val/accuracy 0.5000")
    assert len(last) <= 90


def test_a_bar_is_closed_with_its_line(clocked):
    file = Terminal()
    engine = clocked(1, Progress(file=file))
    engine.on("step_end", when=2)(lambda loop: loop.stop("enough"))
    engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert "2/3" in file.getvalue().split("\r")[-1]
    assert file.getvalue().endswith("\n")


def test_a_bar_moves_at_each_interval(clocked):
    file = Terminal()
    clocked(4, Progress(interval=10, file=file)).run(jnp.int32(0), [1] * 7, epochs=1)
    shown = [step for step in range(8) if f" {step}/7 " in file.getvalue()]
    assert shown == [0, 3, 6, 7]


def test_a_bar_of_a_run_that_goes_on_starts_there():
    file = Terminal()
    first = Engine(add).run(jnp.int32(0), [1] * 5, epochs=1)
    Engine(add, [Progress(file=file)]).run(first, [1] * 5, epochs=2)
    assert " 5/10 |########        | ? left" in file.getvalue()
    assert " 0/10 " not in file.getvalue()


def test_a_bar_leaves_no_thread_behind():
    before = set(threading.enumerate())
    Engine(add, [Progress(file=Terminal())]).run(jnp.int32(0), [1, 2], epochs=3)
    assert set(threading.enumerate()) == before
