"""How far a run is: lines in a log, a line that moves in a terminal, a notebook's."""

import contextlib
import fcntl
import io
import itertools
import os
import pty
import re
import struct
import termios
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, evaluate, processes
from onstep.callbacks import Evaluate, Progress, progress


def add(state, batch):
    return state + batch, {"loss": batch}


def loss(state, batch):
    return {"loss": batch}


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


class Slow:
    """Data of which each batch takes a second on the clock of an engine.

    Args:
        count: batches.
        look: called when a batch is drawn.
    """

    engine: Engine

    def __init__(self, count, look=lambda: None):
        self.count, self.look = count, look

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            self.engine._clock.now += 1
            self.look()
            yield 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


# Lines.


def test_a_line_is_printed_at_each_interval_and_at_the_end(clocked):
    file = io.StringIO()
    clocked(4, Progress(interval=10, file=file)).run(jnp.int32(0), [1] * 7, epochs=1)
    assert re.findall(r"step (\S+)", file.getvalue()) == ["3/7", "6/7", "7/7"]


def test_a_line_says_epoch_step_rate_time_left_and_the_newest_metrics(clocked):
    file = io.StringIO()
    clocked(30, Progress(interval=60, file=file), log_every=2).run(jnp.int32(0), [1, 2, 3], epochs=3)
    assert file.getvalue().splitlines() == [
        "epoch 1/3  step 2/9",
        "epoch 2/3  step 4/9  30.0 s/step  2:30 left  train/loss 1.500",
        "epoch 2/3  step 6/9  30.0 s/step  1:30 left  train/loss 2.000",
        "epoch 3/3  step 8/9  30.0 s/step  0:30 left  train/loss 2.500",
        "epoch 3/3  step 9/9  30.0 s/step  in 4:30  train/loss 3.000",
    ]


def test_a_line_says_no_more_than_is_known(clocked):
    file = io.StringIO()
    clocked(0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(4)), epochs=1)
    assert file.getvalue() == "epoch 1/1  step 4  2.00 steps/s  in 0:02  train/loss 1.000\n"


def test_a_target_in_steps_is_the_total(clocked):
    file = io.StringIO()
    clocked(0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(9)), steps=4)
    assert file.getvalue() == "epoch 1  step 4/4  2.00 steps/s  in 0:02  train/loss 1.000\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.001, "1,000 steps/s  in 0:00"),
        (0.01, "100 steps/s  in 0:00"),
        (20, "20.0 s/step  in 1:20"),
        (1800, "2:00:00"),
    ],
    ids=["a thousand a second", "a hundred", "seconds", "hours"],
)
def test_rates_and_times_are_said_as_one_would(clocked, seconds, said):
    file = io.StringIO()
    clocked(seconds, Progress(interval=10**9, file=file)).run(jnp.int32(0), [1] * 4, epochs=1)
    assert said in file.getvalue()


def test_the_rate_leaves_out_what_comes_before_the_first_line(clocked):
    file = io.StringIO()
    engine = clocked(2, Progress(interval=3, file=file))

    @engine.on("step_begin")
    def compile_first(loop):
        engine._clock.now += 100 * (loop.step == 0)

    engine.run(jnp.int32(0), [1] * 9, epochs=1)
    assert "epoch 1/1  step 3/9  0.500 steps/s" not in file.getvalue()
    assert "epoch 1/1  step 3/9  2.00 s/step  0:12 left" in file.getvalue()
    assert "in 1:58" in file.getvalue()


def test_rate_time_left_and_time_spent_survive_a_resume(clocked):
    file = io.StringIO()
    engine = clocked(2, Progress(interval=4, file=file))
    first = engine.run(jnp.int32(0), [1] * 100, steps=20)
    before = len(file.getvalue().splitlines())
    engine.run(first, [1] * 100, steps=30)
    lines = file.getvalue().splitlines()[before:]
    assert lines[0] == "epoch 1  step 22/30  2.00 s/step  0:16 left"
    assert lines[-1] == "epoch 1  step 30/30  2.00 s/step  in 1:00  train/loss 1.000"


def test_steps_that_were_run_before_do_not_count_for_the_rate(clocked):
    file = io.StringIO()
    first = Engine(add).run(jnp.int32(0), [1] * 100, epochs=1)
    clocked(2, Progress(interval=3, file=file)).run(first, [1] * 100, steps=106)
    assert "epoch 2  step 104/106  2.00 s/step  0:04 left" in file.getvalue()
    assert "epoch 2  step 106/106  2.00 s/step  in 0:12" in file.getvalue()


def test_a_fresh_run_counts_from_nothing(clocked):
    file = io.StringIO()
    engine = clocked(1, Progress(interval=100, file=file))
    for _ in range(2):
        engine.run(jnp.int32(0), [1] * 5, epochs=1)
    assert re.findall(r"in \S+", file.getvalue()) == ["in 0:05", "in 0:05"]


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
    assert file.getvalue() == f"epoch 1/1  step 2/2  1.00 steps/s  in 0:02  {shown}\n"


def test_a_value_that_is_not_finite_is_shown_as_such(clocked):
    file = io.StringIO()
    clocked(1, Progress(file=file)).run(jnp.float32(0), [float("nan")], epochs=1)
    assert file.getvalue().endswith("train/loss nan\n")


def test_lines_go_to_stderr_by_default(capsys):
    Engine(add, [Progress()]).run(jnp.int32(0), [1, 1], epochs=1)
    captured = capsys.readouterr()
    assert captured.err.startswith("epoch 1/1  step 2/2")
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
    assert file.getvalue() == "epoch 1/1  step 2/3  1.00 steps/s  in 0:02\n"


def test_a_long_evaluation_says_how_far_it_is(clocked):
    file, data = io.StringIO(), Slow(10)
    data.engine = clocked(1, Evaluate(loss, data), Progress(interval=4, file=file))
    data.engine.run(jnp.int32(0), [1, 1], epochs=2)
    assert file.getvalue().splitlines() == [
        "epoch 1/2  step 2/4  val 4/10, 0:06 left",
        "epoch 1/2  step 2/4  val 8/10, 0:02 left",
        "epoch 2/2  step 3/4  1.00 steps/s  0:06 left  val/loss 1.000",
        "epoch 2/2  step 4/4  val 4/10, 0:06 left",
        "epoch 2/2  step 4/4  val 8/10, 0:02 left",
        "epoch 2/2  step 4/4  1.00 steps/s  in 0:24  val/loss 1.000, train/loss 1.000",
    ]


def test_an_evaluation_of_unknown_length_says_how_many_batches_are_done(clocked):
    file, data = io.StringIO(), Slow(5)
    data.engine = engine = clocked(1, Progress(interval=4, file=file))

    @engine.on("epoch_end")
    def test(loop):
        watch = engine.callbacks["Progress"].evaluating(loop, "test")
        evaluate(loss, loop.state, (batch for batch in data), watch=watch)

    engine.run(jnp.int32(0), [1], epochs=1)
    assert file.getvalue().splitlines()[0] == "epoch 1/1  step 1/1  test 4"


@pytest.mark.parametrize(
    ("data", "steps", "total"),
    [([1, 1, 1], None, 3), ([1, 1, 1], 2, 2), (itertools.repeat(1), 2, 2), (iter([1, 1]), None, None)],
    ids=["all", "some", "endless", "unknown"],
)
def test_an_evaluation_tells_how_many_batches_are_done_and_of_how_many(data, steps, total):
    told = []
    evaluate(loss, 0, data, steps=steps, watch=lambda *done: told.append(done))
    assert told == [(n + 1, total) for n in range(total or 2)]


def test_processes_but_the_first_are_silent(clocked, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    file, data = Terminal(), Slow(5)
    data.engine = clocked(1, Evaluate(loss, data), Progress(interval=0.1, file=file))
    data.engine.run(jnp.int32(0), [1, 1], epochs=2)
    assert file.getvalue() == ""


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


# A line that moves.


class Screen:
    """A terminal, and what a person in front of it sees."""

    def __init__(self, columns):
        self._end, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._end, False)
        self.file = os.fdopen(inside, "w", encoding="utf-8")
        self._columns, self._rows, self._row, self._column = columns, [""], 0, 0

    def rows(self):
        """The lines on it now."""
        self.file.flush()
        sent = b""
        with contextlib.suppress(BlockingIOError):  # nothing more is new
            while True:
                sent += os.read(self._end, 4096)
        for mark, moves, text in re.findall("(\r|\n|\x1b\\[(\\d*)[AJ])|([^\r\n\x1b]+)", sent.decode()):
            self._type(mark, moves, text)
        return [row.rstrip() for row in self._rows]

    def _type(self, mark, moves, text):
        if mark == "\r":
            self._column = 0
        elif mark == "\n":
            self._row += 1
            self._rows += [""] * (self._row == len(self._rows))
        elif mark.endswith("A"):
            self._row -= int(moves)
        elif mark.endswith("J"):
            self._rows[self._row :] = [self._rows[self._row][: self._column]]
        else:
            before = self._rows[self._row].ljust(self._column)
            self._rows[self._row] = before[: self._column] + text + before[self._column + len(text) :]
            self._column += len(text)
            assert self._column < self._columns, "the line would be wrapped"

    def close(self):
        self.file.close()
        os.close(self._end)


@pytest.fixture
def screen(monkeypatch):
    """Makes a screen that is so many columns wide."""
    monkeypatch.setenv("TERM", "xterm")
    made = []

    def make(columns=80):
        made.append(Screen(columns))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_terminal_sees_one_line_that_moves(clocked, screen):
    seen, person = [], screen(110)
    engine = clocked(4, Progress(interval=10, file=person.file), log_every=2)
    engine.on("step_begin")(lambda loop: seen.append(person.rows()))
    engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert seen[2] == [""]
    assert seen[3] == ["epoch 1/2 |████████▎  | step 3/8  train/loss 1.000"]
    assert seen[6] == ["epoch 2/2 |█████▌     | step 6/8  4.00 s/step  0:08 left  train/loss 1.000"]
    assert person.rows() == ["epoch 2/2 |███████████| step 8/8  4.00 s/step  in 0:32  train/loss 1.000", ""]


def test_a_long_evaluation_has_a_line_of_its_own_which_is_gone_afterwards(clocked, screen):
    during, after, person = [], [], screen()
    data = Slow(10, lambda: during.append(person.rows()))
    data.engine = engine = clocked(1, Evaluate(loss, data), Progress(interval=2, file=person.file))
    engine.on("log")(lambda loop, record: after.append(person.rows()))
    engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert during[1] == ["epoch 1/2 |████    | step 2/8"]
    assert during[5] == [
        "epoch 1/2 |████████| step 4/8  1.00 steps/s  0:04 left",
        "val       |███▏    | 4/10  0:06 left",
    ]
    assert after[0] == ["epoch 1/2 |████████| step 4/8  1.00 steps/s  0:14 left  val/loss 1.000"]
    assert during[15] == [
        "epoch 2/2 |████████| step 8/8  1.00 steps/s  0:00 left  val/loss 1.000",
        "val       |███▏    | 4/10  0:06 left",
    ]
    assert person.rows() == ["epoch 2/2 |████████| step 8/8  1.00 steps/s  in 0:28  val/loss 1.000", ""]


def test_short_evaluations_have_no_line(clocked, screen):
    during, person = [], screen()
    data = Slow(4, lambda: during.append(person.rows()))
    data.engine = clocked(1, Evaluate(loss, data), Progress(interval=6, file=person.file))
    data.engine.run(jnp.int32(0), [1] * 3, epochs=3)
    assert max(map(len, during)) == 1


def test_no_line_is_left_by_an_evaluation_that_fails(clocked, screen):
    person = screen()

    def fail():
        if len(person.rows()) == 2:
            raise OSError("disk gone")

    data = Slow(10, fail)
    data.engine = clocked(1, Evaluate(loss, data), Progress(interval=2, file=person.file))
    with pytest.raises(OSError, match="disk gone"):
        data.engine.run(jnp.int32(0), [1] * 4, epochs=2)
    line, below = person.rows()
    assert (line[:30], below) == ("epoch 1/2 |████████| step 4/8 ", "")


def test_a_narrow_terminal_gets_whole_values_evaluations_first_and_a_shorter_bar(clocked, screen):
    narrow = screen(73)
    engine = clocked(1, Progress(interval=1, file=narrow.file))
    engine.on("step_end")(lambda loop: loop.log({"train/first": 1, "val/accuracy": 0.5, "test/very_long_name": 2}))
    engine.run(jnp.int32(0), [1] * 5, epochs=2)
    assert narrow.rows()[0] == "epoch 2/2 |█████| step 10/10  1.00 steps/s  in 0:10  val/accuracy 0.5000"


def test_a_line_is_never_wider_than_the_terminal(clocked, screen):
    narrow = screen(30)
    clocked(1, Progress(interval=1, file=narrow.file)).run(jnp.int32(0), [1] * 5, epochs=2)
    assert narrow.rows() == ["epoch 2/2 |█████| step 10/10", ""]


def test_the_bar_is_the_runs_where_epochs_have_no_known_length(clocked, screen):
    person = screen()
    engine = clocked(1, Progress(interval=100, file=person.file))
    engine.on("step_end")(lambda loop: loop.stop("enough") if loop.step == 2 else None)
    engine.run(jnp.int32(0), (1 for _ in range(8)), steps=8)
    assert person.rows()[0] == "epoch 1 |██      | step 2/8  1.00 steps/s  in 0:02  train/loss 1.000"


def test_without_a_known_target_there_is_no_bar(clocked, screen):
    person = screen()
    clocked(1, Progress(file=person.file)).run(jnp.int32(0), (1 for _ in range(8)), epochs=1)
    assert person.rows()[0] == "epoch 1/1  step 8  1.00 steps/s  in 0:08  train/loss 1.000"


def test_what_is_said_before_the_first_step_is_not_mixed_with_the_bar(clocked, screen, monkeypatch):
    person = screen()
    monkeypatch.setattr("sys.stderr", person.file)
    first = Engine(add).run(jnp.int32(0), [1] * 4, steps=6)
    clocked(1, Progress(interval=1)).run(first, [1] * 4, epochs=3)
    assert person.rows() == [
        "onstep: going on after step 6, epoch 1 of 3",
        "onstep: skipping 2 batches of the data that were used before",
        "epoch 3/3 |████████| step 12/12  1.00 steps/s  in 0:06  train/loss 1.000",
        "",
    ]


def test_a_run_whose_first_step_fails_shows_no_bar(clocked, screen):
    person = screen()
    engine = clocked(1, Progress(file=person.file))

    @engine.on("step_begin")
    def fail(loop):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert person.rows() == [""]


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    Engine(add, [Progress(file=file)]).run(jnp.int32(0), [1, 2], epochs=3)
    assert file.getvalue().startswith("epoch 3/3  step 6/6")


def test_a_bar_is_plain_where_the_encoding_has_no_blocks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    Engine(add, [Progress(file=file)]).run(jnp.int32(0), [1, 2], epochs=3)
    assert file.getvalue().split("\x1b[J")[-1].startswith("epoch 3/3 |##########| step 6/6")


def test_nothing_is_shown_and_no_clock_is_read_between_two_updates(clocked):
    file = io.StringIO()
    engine = clocked(1, Progress(interval=1000, file=file), log_every=10**6)
    reads = []
    progress.time.monotonic = lambda: reads.append(1) or engine._clock.now
    engine.run(jnp.int32(0), [1] * 900, epochs=1)
    assert len(reads) < 10
    assert len(file.getvalue().splitlines()) == 1


def test_it_leaves_no_thread_behind():
    before = set(threading.enumerate())
    Engine(add, [Progress(file=Terminal())]).run(jnp.int32(0), [1, 2], epochs=3)
    assert set(threading.enumerate()) == before


# A notebook.


@pytest.mark.slow
def test_an_executed_notebook_holds_the_last_state_and_no_more():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = """
import time
import jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Evaluate, Progress

def validation(epoch):
    for _ in range(20):
        time.sleep(0.02)
        yield 1

def add(state, batch):
    return state + batch, {"<loss>": batch}

engine = Engine(add, [Evaluate(lambda state, batch: {"loss": batch}, validation), Progress(interval=0.05)])
result = engine.run(jnp.int32(0), [1] * 8, epochs=3)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (shown,) = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    said = r"epoch 3/3 .* step 24/24  .* steps/s  in 0:0\d  val/loss 1.000"
    assert re.fullmatch(rf"{said}, train/<loss> 1.000", shown.data["text/plain"])
    assert re.search(r'<progress value="1.0000" max="1"></progress> step 24/24 .*&lt;loss&gt;', shown.data["text/html"])
