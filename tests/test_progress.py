"""The progress of a run: lines in a log, a bar in a terminal and in a notebook."""

import contextlib
import errno
import fcntl
import functools
import io
import itertools
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from onstep import Callback, Engine, evaluate, processes
from onstep.callbacks import Checkpoint, Evaluate, Progress, Table, Timing, progress
from onstep.callbacks._support import layout, terminal, watch
from onstep.storage import Checkpoints
from onstep.testing import FakeClock, counting_step
from onstep.tools import log_user


def loss(state, batch):
    return {"loss": batch}


class StepTime(Callback):
    """Lets every step take some seconds on a clock."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, loop):
        self.clock.advance(self.seconds)


@pytest.fixture(autouse=True)
def silent_watch(monkeypatch):
    """A slow machine must not add lines about what a run is doing; tests of these lines look by themselves."""
    monkeypatch.setattr(watch, "TICK", 3600)


@pytest.fixture
def clock(monkeypatch):
    """The clock that Progress reads."""
    clock = FakeClock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    return clock


def timed_engine(clock, seconds, *callbacks, **options):
    """An engine whose steps take some seconds."""
    return Engine(counting_step, [StepTime(clock, seconds), *callbacks], clock=clock, **options)


class SlowData:
    """Data whose batches take a second each.

    Args:
        clock: the clock.
        count: the number of batches.
        look: called when a batch is drawn.
    """

    def __init__(self, clock, count, look=lambda: None):
        self.clock, self.count, self.look = clock, count, look

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            self.clock.advance(1)
            self.look()
            yield 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


# Lines.


def test_a_line_is_printed_at_each_interval_and_at_the_end(clock):
    file = io.StringIO()
    timed_engine(clock, 4, Progress(interval=10, file=file)).run(jnp.int32(0), [1] * 7, epochs=1)
    assert re.findall(r"step (\S+)", file.getvalue()) == ["3/7", "6/7", "7/7"]


def test_a_line_shows_epoch_step_rate_time_left_and_the_newest_metrics(clock):
    file = io.StringIO()
    timed_engine(clock, 30, Progress(interval=60, file=file), log_every=2).run(jnp.int32(0), [1, 2, 3], epochs=3)
    assert file.getvalue().splitlines() == [
        "epoch 1/3  step 2/9",
        "epoch 2/3  step 4/9  30.0 s/step  2:30 left  train/loss 1.500",
        "epoch 2/3  step 6/9  30.0 s/step  1:30 left  train/loss 2.000",
        "epoch 3/3  step 8/9  30.0 s/step  0:30 left  train/loss 2.500",
        "epoch 3/3  step 9/9  30.0 s/step  in 4:30  train/loss 3.000",
    ]


def test_a_line_leaves_out_what_is_unknown(clock):
    file = io.StringIO()
    timed_engine(clock, 0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(4)), epochs=1)
    assert file.getvalue() == "epoch 1/1  step 4  2.00 steps/s  in 0:02  train/loss 1.000\n"


def test_a_target_in_steps_is_the_total(clock):
    file = io.StringIO()
    timed_engine(clock, 0.5, Progress(file=file)).run(jnp.int32(0), (1 for _ in range(9)), steps=4)
    assert file.getvalue() == "epoch 1  step 4/4  2.00 steps/s  in 0:02  train/loss 1.000\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.001, "1,000 steps/s  in 0:00"),
        (0.01, "100 steps/s  in 0:00"),
        (20, "20.0 s/step  in 1:20"),
        (1800, "2:00:00"),
    ],
    ids=["a thousand a second", "a hundred", "seconds", "hours"],
)
def test_rates_and_times_have_readable_units(clock, seconds, text):
    file = io.StringIO()
    timed_engine(clock, seconds, Progress(interval=10**9, file=file)).run(jnp.int32(0), [1] * 4, epochs=1)
    assert text in file.getvalue()


def test_the_rate_leaves_out_the_time_before_the_first_line(clock):
    file = io.StringIO()
    engine = timed_engine(clock, 2, Progress(interval=3, file=file))

    @engine.on("step_begin")
    def compile_first(loop):
        clock.advance(100 * (loop.step == 0))

    engine.run(jnp.int32(0), [1] * 9, epochs=1)
    assert "epoch 1/1  step 3/9  0.500 steps/s" not in file.getvalue()
    assert "epoch 1/1  step 3/9  2.00 s/step  0:12 left" in file.getvalue()
    assert "in 1:58" in file.getvalue()


def test_rate_time_left_and_time_spent_survive_a_resume(clock):
    file = io.StringIO()
    engine = timed_engine(clock, 2, Progress(interval=4, file=file))
    first = engine.run(jnp.int32(0), [1] * 100, steps=20)
    before = len(file.getvalue().splitlines())
    engine.run(first, [1] * 100, steps=30)
    lines = file.getvalue().splitlines()[before:]
    assert lines[0] == "epoch 1  step 22/30  2.00 s/step  0:16 left"
    assert lines[-1] == "epoch 1  step 30/30  2.00 s/step  in 1:00  train/loss 1.000"


def test_steps_of_a_run_without_progress_do_not_count_for_the_rate(clock):
    file = io.StringIO()
    first = Engine(counting_step).run(jnp.int32(0), [1] * 100, epochs=1)
    timed_engine(clock, 2, Progress(interval=3, file=file)).run(first, [1] * 100, steps=106)
    assert "epoch 2  step 104/106  2.00 s/step  0:04 left" in file.getvalue()
    assert "epoch 2  step 106/106  2.00 s/step  in 0:12" in file.getvalue()


def test_a_second_run_counts_from_zero(clock):
    file = io.StringIO()
    engine = timed_engine(clock, 1, Progress(interval=100, file=file))
    for _ in range(2):
        engine.run(jnp.int32(0), [1] * 5, epochs=1)
    assert re.findall(r"in \S+", file.getvalue()) == ["in 0:05", "in 0:05"]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (None, "val/acc 0.5000, train/loss 2.000"),
        (["train/loss"], "train/loss 2.000"),
        (["epoch/loss", "train/loss"], "epoch/loss 2.000, train/loss 2.000"),
    ],
    ids=["all but means of epochs", "one", "several"],
)
def test_the_metrics_to_show_can_be_chosen(clock, metrics, shown):
    file = io.StringIO()
    engine = timed_engine(clock, 1, Progress(file=file, metrics=metrics))
    engine.on("epoch_end")(lambda loop: loop.log({"val/acc": 0.5}))
    engine.run(jnp.int32(0), [1, 3], epochs=1)
    assert file.getvalue() == f"epoch 1/1  step 2/2  1.00 steps/s  in 0:02  {shown}\n"


def test_a_metric_that_was_never_recorded_is_a_warning_and_the_others_are_shown(clock):
    file = io.StringIO()
    engine = timed_engine(clock, 1, Progress(file=file, metrics=["epoch/lss", "epoch/loss"]))
    with pytest.warns(UserWarning, match=r"Progress watches 'epoch/lss', but .* Did you mean epoch/loss\?"):
        engine.run(jnp.int32(0), [1, 3], epochs=1)
    assert file.getvalue().endswith("in 0:02  epoch/loss 2.000\n")


def test_one_string_as_metrics_is_refused():
    with pytest.raises(ValueError, match=r"Progress needs metrics to be a list of names, got 'train/loss'"):
        Progress(metrics="train/loss")


def test_a_value_that_is_not_finite_is_shown(clock):
    file = io.StringIO()
    timed_engine(clock, 1, Progress(file=file)).run(jnp.float32(0), [float("nan")], epochs=1)
    assert file.getvalue().endswith("train/loss nan\n")


def test_lines_go_to_stderr_by_default(capsys):
    Engine(counting_step, [Progress()]).run(jnp.int32(0), [1, 1], epochs=1)
    captured = capsys.readouterr()
    assert captured.err.startswith("epoch 1/1  step 2/2")
    assert captured.out == ""


def test_a_failed_run_shows_the_step_it_reached(clock):
    file = io.StringIO()
    engine = timed_engine(clock, 1, Progress(file=file))

    @engine.on("step_end")
    def fail(loop):
        if loop.step == 2:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    assert file.getvalue() == "epoch 1/1  step 2/3  1.00 steps/s  in 0:02\n"


def test_a_long_evaluation_shows_its_progress(clock):
    file, data = io.StringIO(), SlowData(clock, 10)
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(interval=4, file=file))
    engine.run(jnp.int32(0), [1, 1], epochs=2)
    assert file.getvalue().splitlines() == [
        "epoch 1/2  step 2/4  val 4/10, 0:06 left",
        "epoch 1/2  step 2/4  val 8/10, 0:02 left",
        "epoch 2/2  step 3/4  1.00 steps/s  0:06 left  val/loss 1.000",
        "epoch 2/2  step 4/4  val 4/10, 0:06 left",
        "epoch 2/2  step 4/4  val 8/10, 0:02 left",
        "epoch 2/2  step 4/4  1.00 steps/s  in 0:24  val/loss 1.000, train/loss 1.000",
    ]


def test_a_task_of_unknown_length_shows_how_much_is_done(clock):
    file, data = io.StringIO(), SlowData(clock, 5)
    engine = timed_engine(clock, 1, Progress(interval=4, file=file))

    @engine.on("epoch_end")
    def test(loop):
        loop.progress("test", 0)
        watch = functools.partial(loop.progress, "test")
        evaluate(loss, loop.state, (batch for batch in data), watch=watch)

    engine.run(jnp.int32(0), [1], epochs=1)
    assert file.getvalue().splitlines()[0] == "epoch 1/1  step 1/1  test 4"


def test_a_task_that_does_not_report_its_beginning_is_timed_from_its_first_report(clock):
    file, data = io.StringIO(), SlowData(clock, 10)
    engine = timed_engine(clock, 1, Progress(interval=4, file=file))
    engine.on("epoch_end")(
        lambda loop: evaluate(loss, loop.state, data, watch=functools.partial(loop.progress, "test"))
    )
    engine.run(jnp.int32(0), [1], epochs=2)
    assert [line for line in file.getvalue().splitlines() if "test" in line] == [
        "epoch 1/2  step 1/2  test 5/10, 0:05 left",
        "epoch 1/2  step 1/2  test 9/10, 0:01 left",
        "epoch 2/2  step 2/2  test 5/10, 0:05 left",
        "epoch 2/2  step 2/2  test 9/10, 0:01 left",
    ]


def test_evaluating_still_works_and_says_what_replaces_it(clock):
    file, data = io.StringIO(), SlowData(clock, 5)
    shown = Progress(interval=4, file=file)
    engine = timed_engine(clock, 1, shown)

    @engine.on("epoch_end")
    def test(loop):
        with pytest.warns(
            DeprecationWarning, match=r"since onstep 0.2\. Use functools\.partial\(loop\.progress, name\)"
        ):
            watch = shown.evaluating(loop, "test")
        evaluate(loss, loop.state, data, watch=watch)

    engine.run(jnp.int32(0), [1], epochs=1)
    assert file.getvalue().splitlines()[0] == "epoch 1/1  step 1/1  test 4/5, 0:01 left"


@pytest.mark.parametrize(
    ("data", "steps", "total"),
    [([1, 1, 1], None, 3), ([1, 1, 1], 2, 2), (itertools.repeat(1), 2, 2), (iter([1, 1]), None, None)],
    ids=["all", "some", "endless", "unknown"],
)
def test_evaluate_reports_the_batches_done_and_their_total(data, steps, total):
    told = []
    evaluate(loss, 0, data, steps=steps, watch=lambda *done: told.append(done))
    assert told == [(n + 1, total) for n in range(total or 2)]


def test_only_the_first_process_prints(clock, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    file, data = Terminal(), SlowData(clock, 5)
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(interval=0.1, file=file))
    engine.run(jnp.int32(0), [1, 1], epochs=2)
    assert file.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
def test_nothing_is_printed_when_no_step_ran(terminal):
    file = Terminal() if terminal else io.StringIO()
    engine = Engine(counting_step, [Progress(file=file)])
    assert file.getvalue() == ""
    first = Engine(counting_step).run(jnp.int32(0), [1, 1], epochs=1)
    engine.run(first, [1, 1], epochs=1)
    assert file.getvalue() == ""


@pytest.mark.parametrize("interval", [0, -1.0])
def test_an_interval_must_be_positive(interval):
    with pytest.raises(ValueError, match="Progress needs interval > 0 in seconds"):
        Progress(interval=interval)


# A bar in a terminal.


class Screen:
    """A terminal, and what its user sees."""

    def __init__(self, columns):
        self._end, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._end, False)
        self.file = os.fdopen(inside, "w", encoding="utf-8")
        self._columns, self._rows, self._row, self._column = columns, [""], 0, 0

    def rows(self):
        """The lines that are visible now."""
        self.file.flush()
        sent = b""
        with contextlib.suppress(BlockingIOError):  # everything is read
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
    """Makes a screen of a given width in columns."""
    monkeypatch.setenv("TERM", "xterm")
    made = []

    def make(columns=80):
        made.append(Screen(columns))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_terminal_shows_one_line_that_is_updated(clock, screen):
    seen, user = [], screen(110)
    engine = timed_engine(clock, 4, Progress(interval=10, file=user.file), log_every=2)
    engine.on("step_begin")(lambda loop: seen.append(user.rows()))
    engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert seen[2] == [""]
    assert seen[3] == ["epoch 1/2 |████████▎  | step 3/8  train/loss 1.000"]
    assert seen[6] == ["epoch 2/2 |█████▌     | step 6/8  4.00 s/step  0:08 left  train/loss 1.000"]
    assert user.rows() == ["epoch 2/2 |███████████| step 8/8  4.00 s/step  in 0:32  train/loss 1.000", ""]


def test_a_long_evaluation_has_its_own_line_while_it_lasts(clock, screen):
    during, after, user = [], [], screen()
    data = SlowData(clock, 10, lambda: during.append(user.rows()))
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(interval=2, file=user.file))
    engine.on("log")(lambda loop, record: after.append(user.rows()))
    engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert during[0] == [""]  # Evaluate traces its step before the run begins
    assert during[1] == ["epoch 1/2 |██████  | step 3/8  1.00 steps/s  0:05 left"]
    assert during[5] == [
        "epoch 1/2 |████████| step 4/8  1.00 steps/s  0:04 left",
        "val       |███▏    | 4/10  0:06 left",
    ]
    assert after[0] == ["epoch 1/2 |████████| step 4/8  1.00 steps/s  0:14 left  val/loss 1.000"]
    assert during[15] == [
        "epoch 2/2 |████████| step 8/8  1.00 steps/s  0:00 left  val/loss 1.000",
        "val       |███▏    | 4/10  0:06 left",
    ]
    assert user.rows() == ["epoch 2/2 |████████| step 8/8  in 0:28  val/loss 1.000, train/loss 1.000", ""]


def test_short_evaluations_have_no_line(clock, screen):
    during, user = [], screen()
    data = SlowData(clock, 4, lambda: during.append(user.rows()))
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(interval=6, file=user.file))
    engine.run(jnp.int32(0), [1] * 3, epochs=3)
    assert max(map(len, during)) == 1


def test_a_failed_evaluation_leaves_no_line_behind(clock, screen):
    user = screen()

    def fail():
        if len(user.rows()) == 2:
            raise OSError("disk gone")

    data = SlowData(clock, 10, fail)
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(interval=2, file=user.file))
    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=2)
    line, below = user.rows()
    assert (line[:30], below) == ("epoch 1/2 |████████| step 4/8 ", "")


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (120, "epoch 2/2 |████████████| step 10/10  in 0:10  val/accuracy 0.5000, val/loss 0.2500, train/first 1.000"),
        (100, "epoch 2/2 |██████████| step 10/10  in 0:10  val/accuracy 0.5000, val/loss 0.2500, train/loss 1.000"),
        (80, "epoch 2/2 |████████| step 10/10  in 0:10  val/loss 0.2500, train/loss 1.000"),
        (60, "epoch 2/2  step 10/10  val/loss 0.2500, train/loss 1.000"),
        (40, "epoch 2/2  step 10/10  train/loss 1.000"),
        (30, "epoch 2/2  train/loss 1.000"),
        (20, "epoch 2/2 |█████|"),
    ],
)
def test_a_narrow_terminal_leaves_out_rates_and_times_before_losses(clock, screen, columns, row):
    user = screen(columns)
    engine = timed_engine(clock, 1, Progress(interval=1, file=user.file))
    engine.on("step_end")(lambda loop: loop.log({"train/first": 1, "val/accuracy": 0.5, "val/loss": 0.25}))
    engine.run(jnp.int32(0), [1] * 5, epochs=2)
    assert user.rows()[0].startswith(row)


def test_a_narrow_terminal_shows_chosen_metrics_before_rates_and_times(clock, screen):
    user = screen(80)
    shown = Progress(interval=1, file=user.file, metrics=["val/accuracy", "train/loss", "test/very_long_name"])
    engine = timed_engine(clock, 1, shown)
    engine.on("step_end")(lambda loop: loop.log({"val/accuracy": 0.5, "test/very_long_name": 2}))
    engine.run(jnp.int32(0), [1] * 5, epochs=2)
    assert user.rows()[0] == "epoch 2/2 |████████| step 10/10  in 0:10  val/accuracy 0.5000, train/loss 1.000"


def test_wide_characters_take_two_columns(clock, screen):
    assert [terminal.width(text) for text in ("loss", "损失", "e\u0301")] == [4, 4, 1]
    part = layout.Part("epoch 1/1", None, ["step 1/1"], ["train/损失 1.000"], [0])
    assert layout.bars([part], 28, smooth=True) == ["epoch 1/1  train/损失 1.000"]
    assert layout.bars([part], 27, smooth=True) == ["epoch 1/1  step 1/1"]


def test_the_bar_shows_the_run_if_the_length_of_an_epoch_is_unknown(clock, screen):
    user = screen()
    engine = timed_engine(clock, 1, Progress(interval=100, file=user.file))
    engine.on("step_end")(lambda loop: loop.stop("enough") if loop.step == 2 else None)
    engine.run(jnp.int32(0), (1 for _ in range(8)), steps=8)
    assert user.rows()[0] == "epoch 1 |██      | step 2/8  1.00 steps/s  in 0:02  train/loss 1.000"


def test_there_is_no_bar_without_a_known_target(clock, screen):
    user = screen()
    timed_engine(clock, 1, Progress(file=user.file)).run(jnp.int32(0), (1 for _ in range(8)), epochs=1)
    assert user.rows()[0] == "epoch 1/1  step 8  1.00 steps/s  in 0:08  train/loss 1.000"


def test_messages_before_the_first_step_do_not_mix_with_the_bar(clock, screen, monkeypatch):
    user = screen()
    monkeypatch.setattr("sys.stderr", user.file)
    first = Engine(counting_step).run(jnp.int32(0), [1] * 4, steps=6)
    timed_engine(clock, 1, Progress(interval=1)).run(first, [1] * 4, epochs=3)
    assert user.rows() == [
        "onstep: resuming from step 6 (epoch 1 of 3)",
        "onstep: skipping the first 2 batches of the data, already used",
        "epoch 3/3 |████████| step 12/12  1.00 steps/s  in 0:06  train/loss 1.000",
        "",
    ]


@pytest.fixture
def stopped_at_step_4(clock, screen, monkeypatch):
    """A function that runs with a bar, prints with another function after step 4, and returns the rows of the screen.

    Stdout, stderr and a logger write to the same terminal.
    """

    def rows(show, *callbacks):
        user = screen()
        for name in ("sys.stdout", "sys.stderr"):
            monkeypatch.setattr(name, user.file)
        engine = timed_engine(clock, 1, *callbacks, Progress(interval=1))

        @engine.on("step_begin")
        def at_step_5(loop):
            if loop.step == 4:
                show()
                seen.append(user.rows())

        seen = []
        engine.run(jnp.int32(0), [1] * 8, epochs=1)
        return seen[0], user.rows()

    return rows


BAR = "epoch 1/1 |████████| step 8/8  1.00 steps/s  in 0:08  train/loss 1.000"


@pytest.mark.parametrize(
    "show",
    [
        lambda: print("hello"),
        lambda: print("hello", file=sys.stderr),
        lambda: sys.stdout.write("hello\n"),
        lambda: log_user("hello"),
        lambda: logging.StreamHandler().emit(logging.makeLogRecord({"msg": "hello"})),
    ],
    ids=["print", "print to stderr", "write", "message of ours", "logger"],
)
def test_what_is_printed_in_a_callback_is_on_a_line_of_its_own_above_the_bar(stopped_at_step_4, show):
    during, after = stopped_at_step_4(show)
    assert during[0] in ("hello", "onstep: hello")
    assert (during[1:], after) == ([""], [during[0], BAR, ""])


def test_a_logger_that_was_made_before_the_run_prints_above_the_bar(clock, screen):
    user = screen()
    handler = logging.StreamHandler(user.file)
    engine = timed_engine(clock, 1, Progress(interval=1, file=user.file))
    engine.on("step_end", when=4)(lambda loop: handler.emit(logging.makeLogRecord({"msg": f"at {loop.step}"})))
    engine.run(jnp.int32(0), [1] * 8, epochs=1)
    assert user.rows() == ["at 4", "at 8", BAR, ""]


def test_a_line_that_a_callback_begins_is_completed_by_the_bar_on_the_next_line(stopped_at_step_4):
    during, after = stopped_at_step_4(lambda: print("hello", end="", flush=True))
    assert (during, after) == (["hello"], ["hello", BAR, ""])


def test_a_moving_line_of_another_library_is_overwritten(stopped_at_step_4):
    during, after = stopped_at_step_4(lambda: print("\rloading 3%", end="", flush=True))
    assert (during, after) == (["loading 3%"], [BAR, ""])


def test_rows_of_a_table_are_above_the_bar(stopped_at_step_4):
    _, after = stopped_at_step_4(lambda: None, Table(["epoch/loss"], when=4, best={"epoch/loss": "min"}))
    assert after == ["epoch     step  epoch/loss", "    1        8      1.0000*", BAR, ""]


def test_the_bar_of_a_run_inside_a_callback_takes_the_place_of_the_outer_bar(clock, stopped_at_step_4):
    inner = timed_engine(clock, 1, Progress(interval=1))
    during, after = stopped_at_step_4(lambda: inner.run(jnp.int32(0), [1] * 4, epochs=1))
    row = "epoch 1/1 |████████| step 4/4  1.00 steps/s  in 0:04  train/loss 1.000"
    assert (during, after[0], len(after)) == ([row, ""], row, 3)


def test_streams_are_as_they_were_after_a_run(stopped_at_step_4):
    stopped_at_step_4(lambda: print("hello"))
    assert "write" not in vars(sys.stdout)
    assert "write" not in vars(sys.stderr)


def test_a_stream_whose_write_another_library_replaced_in_mid_run_works_after_it(stopped_at_step_4):
    def replace():
        before = sys.stdout.write
        sys.stdout.write = lambda text: seen.append(text) or before(text)

    seen = []
    _, rows = stopped_at_step_4(replace)
    print("hello")
    assert (rows[-2], seen[-2:]) == (BAR, ["hello", "\n"])


@pytest.mark.parametrize("kind", [io.StringIO, Terminal], ids=["lines", "bar"])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left")], ids=["nobody reads", "disk full"]
)
def test_a_run_goes_on_when_nothing_can_be_shown_any_more(kind, error):
    class Broken(kind):
        def write(self, text):
            raise error

    file, silent = Broken(), isinstance(error, BrokenPipeError)
    engine = Engine(counting_step, [Progress(interval=1e-9, file=file), Table(file=file), Timing(file=file)])
    with contextlib.nullcontext() if silent else pytest.warns(UserWarning, match="could not be printed.*No space left"):
        result = engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert (result.step, file.getvalue()) == (8, "")


PIPED = """
import sys
import jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Progress, Table, Timing
from onstep.testing import counting_step
engine = Engine(counting_step, [Progress(interval=1e-9), Table(file=sys.stderr), Table(), Timing()], log_every=1)
sys.stdin.readline()
result = engine.run(jnp.int32(0), [1] * 50, epochs=20)
open(sys.argv[1], "w").write(str(result.step))
"""


@pytest.mark.slow
def test_a_script_whose_output_nobody_reads_any_more_runs_to_its_end(tmp_path):
    command = [sys.executable, "-c", PIPED, str(tmp_path / "result")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        process.communicate("begin\n", timeout=120)
    assert (process.returncode, (tmp_path / "result").read_text()) == (0, "1000")


@pytest.mark.parametrize("callback", [Progress, Table])
@pytest.mark.parametrize("kind", ["lines", "bar"])
def test_a_name_that_the_console_cannot_show_is_shown_with_question_marks(monkeypatch, callback, kind):
    class Console(io.TextIOWrapper):
        def isatty(self):
            return kind == "bar"

    monkeypatch.setenv("COLUMNS", "150")
    file = Console(io.BytesIO(), encoding="cp1252")
    engine = Engine(lambda state, batch: (state, {"loss→€\x81": batch}), [callback(file=file)])
    assert engine.run(jnp.int32(0), [1, 3], epochs=1).step == 2
    assert "/loss?€?" in file.buffer.getvalue().decode("cp1252")


def test_a_run_whose_first_step_fails_shows_no_bar(clock, screen):
    user = screen()
    engine = timed_engine(clock, 1, Progress(file=user.file))

    @engine.on("step_begin")
    def fail(loop):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1] * 4, epochs=2)
    assert user.rows() == [""]


def test_a_terminal_that_cannot_move_its_cursor_shows_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    Engine(counting_step, [Progress(file=file)]).run(jnp.int32(0), [1, 2], epochs=3)
    assert file.getvalue().startswith("epoch 3/3  step 6/6")


def test_a_bar_is_plain_ascii_if_the_encoding_has_no_block_characters(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    Engine(counting_step, [Progress(file=file)]).run(jnp.int32(0), [1, 2], epochs=3)
    assert file.getvalue().split("\x1b[J")[-1].startswith("epoch 3/3 |##########| step 6/6")


def test_nothing_is_shown_and_no_clock_is_read_between_two_updates(clock):
    file, engines = io.StringIO(), FakeClock()
    engine = Engine(counting_step, [Progress(interval=1000, file=file)], log_every=10**6, clock=engines)
    engine.run(jnp.int32(0), [1] * 900, epochs=1)
    assert clock.reads < 10
    assert len(file.getvalue().splitlines()) == 1


def test_it_leaves_no_thread_behind():
    before = set(threading.enumerate())
    Engine(counting_step, [Progress(file=Terminal())]).run(jnp.int32(0), [1, 2], epochs=3)
    assert set(threading.enumerate()) == before


# A line for each epoch.


def learning(state, batch):
    return state + batch, {"loss": 1 / (state + 1), "accuracy": 1 - 1 / (state + 1)}


def score(state, batch):
    return {"loss": 2 / (state + 1)}


def lines_of_epochs(clock, file, **options):
    callbacks = [StepTime(clock, 1), Progress(file=file, interval=1, epoch_lines=True, **options)]
    return Engine(learning, [*callbacks, Evaluate(score, [jnp.ones(2)])], clock=clock)


def test_a_log_file_has_one_line_for_each_epoch_with_training_beside_validation(clock):
    file = io.StringIO()
    lines_of_epochs(clock, file).run(jnp.float32(0), [jnp.float32(1)] * 2, epochs=10)
    first, *_, last = file.getvalue().splitlines()
    assert first == "epoch  1/10  accuracy 0.2500  loss 0.7500  val/loss 0.6667  2.0 s"
    assert last == "epoch 10/10  accuracy 0.9487  loss 0.05132  val/loss 0.09524  2.0 s"
    assert len(file.getvalue().splitlines()) == 10


def test_the_metrics_of_the_lines_of_epochs_can_be_chosen(clock):
    file = io.StringIO()
    lines_of_epochs(clock, file, metrics=["val/loss", "epoch/loss"]).run(jnp.float32(0), [jnp.float32(1)] * 2, epochs=2)
    assert file.getvalue().splitlines()[0] == "epoch 1/2  val/loss 0.6667  loss 0.7500  2.0 s"


def test_a_run_that_ends_within_an_epoch_shows_its_last_step(clock):
    file = io.StringIO()
    lines_of_epochs(clock, file).run(jnp.float32(0), [jnp.float32(1)] * 40, steps=70)
    assert file.getvalue().splitlines() == [
        "epoch 1  accuracy 0.8930  loss 0.1070  val/loss 0.04878  40.0 s",
        "epoch 2  step 70/70  1.00 steps/s  in 1:10  val/loss 0.04878, train/accuracy 0.9833, train/loss 0.01668",
    ]


def test_a_terminal_keeps_the_lines_of_epochs_above_the_bar(clock, screen):
    seen, user = [], screen()
    engine = lines_of_epochs(clock, user.file)
    engine.on("step_end")(lambda loop: seen.append(user.rows()))
    engine.run(jnp.float32(0), [jnp.float32(1)] * 2, epochs=2)
    first = "epoch 1/2  accuracy 0.2500  loss 0.7500  val/loss 0.6667  2.0 s"
    assert seen[2][0] == first
    assert seen[2][1].startswith("epoch 2/2 |████    | step 3/4  ")
    assert user.rows() == [first, "epoch 2/2  accuracy 0.7083  loss 0.2917  val/loss 0.4000  2.0 s", ""]


def test_a_terminal_shows_the_time_of_an_epoch_only_if_there_is_room(clock, screen):
    user = screen(60)
    lines_of_epochs(clock, user.file).run(jnp.float32(0), [jnp.float32(1)] * 2, epochs=1)
    assert user.rows() == ["epoch 1/1  accuracy 0.2500  loss 0.7500  val/loss 0.6667", ""]


# What the run is doing when the bar does not move.


class Look:
    """Lets a run look at itself as the other thread does, as if it had been silent for some seconds."""

    def __init__(self, monkeypatch):
        self.clock = FakeClock()
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=self.clock))
        made = watch.ActivityWatch.__init__

        def remember(made_watch, *args, **options):
            self.watch = made_watch
            made(made_watch, *args, **options)

        monkeypatch.setattr(watch.ActivityWatch, "__init__", remember)

    def __call__(self, seconds=3):
        self.clock.advance(0.1)
        self.watch.look()
        self.clock.advance(seconds - 0.1)
        self.watch.look()


@pytest.fixture
def look(monkeypatch):
    monkeypatch.setattr(watch, "TICK", 0.5)
    monkeypatch.setattr(watch.ActivityWatch, "_watch", lambda watch: None)  # the other thread ends at once
    return Look(monkeypatch)


def test_the_line_below_the_bar_says_that_the_step_is_compiled(clock, screen, look):
    seen, user = [], screen()

    def step(state, batch):
        look()
        seen.append(user.rows())
        return state, {"loss": batch}

    Engine(step, [Progress(file=user.file)], clock=clock, steps_per_call=1).run(0, [1.0] * 4, epochs=2)
    assert seen[0] == ["epoch 1/2 |        | step 0/8", "compiling the step  0:03"]
    assert user.rows()[0].startswith("epoch 2/2 |████████| step 8/8")
    assert len(user.rows()) == 2


def test_the_line_below_the_bar_says_which_line_of_the_data_it_waits_for(clock, screen, look):
    seen, user = [], screen()

    def batches(epoch):
        for number in range(4):
            if number == 2:
                look(65)
                seen.append(user.rows())
            yield number

    Engine(counting_step, [Progress(file=user.file)], clock=clock, steps_per_call=1).run(0, batches, epochs=1)
    assert seen[0][0].startswith("epoch 1/1  step")
    assert re.fullmatch(r"reading the data \(test_progress.py:\d+ in __call__\)  1:05", seen[0][1])


class SlowEvents(Callback):
    """Looks at the screen in some events, as if each took seconds."""

    def __init__(self, look, rows):
        self._look, self._rows, self.seen = look, rows, []

    def on_load(self, loop):
        self._look()
        self.seen.append(self._rows())

    on_run_end = on_load


def test_callbacks_before_it_are_shown_while_they_load_and_end(clock, screen, look):
    user = screen()
    slow = SlowEvents(look, user.rows)
    engine = timed_engine(clock, 1, slow, Progress(file=user.file))
    engine.run(jnp.int32(0), [1] * 8, epochs=1)
    loading, ending = slow.seen
    assert loading == ["running SlowEvents.on_load  0:03"]
    assert ending == [BAR, "running SlowEvents.on_run_end  0:03"]
    assert user.rows() == [BAR, ""]


def test_a_checkpoint_that_is_saved_and_restored_is_named(tmp_path, monkeypatch, clock, screen, look):
    user, seen = screen(), []

    class Slow(Checkpoints):
        def load(self, *args, **options):
            look()
            seen.append(user.rows())
            return super().load(*args, **options)

    monkeypatch.setattr("onstep.storage.writer.Checkpoints", Slow)
    for epochs in (1, 2):
        engine = timed_engine(clock, 1, Checkpoint(tmp_path), Progress(file=user.file))
        engine.run(jnp.int32(0), [1] * 8, epochs=epochs)
    assert seen[0][-1] == "restoring the run (Checkpoint)  0:03"


def test_an_evaluation_that_is_compiled_is_shown_until_it_reports(clock, screen, look):
    user, seen = screen(), []
    data = SlowData(clock, 3, lambda: seen.append((look(), user.rows()[-1])[1]))
    engine = timed_engine(clock, 1, Evaluate(loss, data), Progress(file=user.file))
    engine.run(jnp.int32(0), [1] * 8, epochs=1)
    assert seen[:2] == ["tracing the evaluation step (val)  0:03", "evaluating (val)  0:03"]
    assert seen[2].startswith("val       |██▋     | 1/3  ")


def test_a_task_that_is_reported_while_a_callback_loads_is_shown(clock):
    class Download(Callback):
        def on_load(self, loop):
            for done in range(5):
                loop.progress("download", done, 4)
                clock.advance(4)

    file = io.StringIO()
    timed_engine(clock, 1, Download(), Progress(interval=10, file=file)).run(jnp.int32(0), [1] * 3, epochs=1)
    assert file.getvalue().splitlines() == [
        "epoch 1/1  step 0/3  download 3/4, 0:04 left",
        "epoch 1/1  step 3/3  1.00 steps/s  in 0:03  train/loss 1.000",
    ]


def test_a_line_that_is_out_of_date_is_removed(clock, screen, look):
    user, seen = screen(), []
    engine = timed_engine(clock, 1, Progress(file=user.file, interval=100))

    @engine.on("step_begin")
    def wait(loop):
        if loop.step == 1:
            look(200)
        if loop.step == 2:
            look.watch.touch()
            look.watch.look()
            seen.append(user.rows())

    engine.run(jnp.int32(0), [1] * 8, epochs=1)
    assert seen == [["epoch 1/1 |        | step 0/8"]]


def test_a_log_file_says_it_after_the_interval_and_then_twice_as_rarely_each_time(clock, look):
    file = io.StringIO()
    engine = timed_engine(clock, 0, Progress(file=file))

    @engine.on("run_begin")
    def wait(loop):
        for _ in range(100):
            look(1)

    engine.run(jnp.int32(0), [1] * 8, epochs=1)
    assert [line.rpartition("  ")[2] for line in file.getvalue().splitlines()[:-1]] == [
        f"running wait.on_run_begin 0:{seconds:02}" if seconds < 60 else "running wait.on_run_begin 1:31"
        for seconds in (12, 23, 46, 91)
    ]


def test_a_log_file_with_lines_for_epochs_has_nothing_else(clock, look):
    file = io.StringIO()
    Engine(counting_step, [Progress(file=file, epoch_lines=True)]).run(jnp.int32(0), [1], epochs=1)
    assert not hasattr(look, "watch")


def test_the_other_thread_shows_what_the_run_does_and_ends_with_it(monkeypatch, screen):
    monkeypatch.setattr(watch, "TICK", 0.01)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    user, before = screen(), threading.active_count()

    def batches(epoch):
        yield 1
        while not user.rows()[-1].startswith("reading the data"):
            assert threading.active_count() == before + 1
        yield 1

    result = Engine(counting_step, [Progress(file=user.file, interval=0.01)]).run(jnp.int32(0), batches, epochs=1)
    assert (result.step, threading.active_count()) == (2, before)


@pytest.mark.parametrize("event", ["on_load", "on_run_begin", "on_step_end", "on_run_end"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_neither_thread_nor_line_nor_replaced_stream(monkeypatch, screen, event, error):
    monkeypatch.setattr(watch, "TICK", 0.01)
    user, before = screen(), threading.active_count()
    monkeypatch.setattr("sys.stdout", user.file)

    def fail(self, loop):
        raise error

    failing = type("Failing", (Callback,), {event: fail})()
    for order in ([failing, Progress(file=user.file)], [Progress(file=user.file), failing]):
        with pytest.raises(error):
            Engine(counting_step, order).run(jnp.int32(0), [1] * 3, epochs=1)
        assert threading.active_count() == before
        assert "write" not in vars(user.file)
        assert user.rows()[-1] == ""


def test_lines_that_several_threads_print_are_whole_and_above_the_bar(screen, monkeypatch):
    user = screen()
    monkeypatch.setattr("sys.stdout", user.file)

    def work(name):
        for number in range(20):
            sys.stdout.write(f"{name} {number}\n")

    engine = Engine(counting_step, [Progress(interval=1e-6)], steps_per_call=1)
    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    monkeypatch.setattr("sys.stderr", user.file)

    @engine.on("run_begin")
    def begin(loop):
        for thread in threads:
            thread.start()

    @engine.on("step_begin")
    def wait(loop):
        for thread in threads if loop.step == 49 else ():
            thread.join()

    engine.run(jnp.int32(0), [1] * 50, epochs=1)
    *printed, bar, end = user.rows()
    assert sorted(printed) == sorted(f"{name} {number}" for name in ("one", "two") for number in range(20))
    assert (bar[:9], end) == ("epoch 1/1", "")


def test_a_forked_child_can_print(screen, monkeypatch):
    user = screen()
    monkeypatch.setattr("sys.stdout", user.file)
    lines = terminal.MovingLines(user.file)
    lines.draw(["a bar"])
    held, release = threading.Event(), threading.Event()

    def hold():
        with terminal._watch.lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    terminal._watch.renew_lock()  # what a child does first
    print("hello")
    release.set()
    thread.join()
    lines.close()
    assert user.rows() == ["hello", ""]


def test_a_bar_in_a_terminal_that_became_narrower_is_replaced_whole(screen):
    user = screen(100)
    lines = terminal.MovingLines(user.file)
    lines.draw(["x" * 90])
    user.rows()
    fcntl.ioctl(user.file.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    assert lines._up() == "\r\x1b[2A\x1b[J"
    lines.close()


# A notebook.


@pytest.mark.slow
def test_an_executed_notebook_contains_only_the_last_state():
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
    line = r"epoch 3/3 .* step 24/24  .* steps/s  in 0:0\d  val/loss 1.000"
    assert re.fullmatch(rf"{line}, train/<loss> 1.000", shown.data["text/plain"])
    assert re.search(r'<progress value="1.0000" max="1"></progress> step 24/24 .*&lt;loss&gt;', shown.data["text/html"])


CELLS = [
    """
import os, signal, tempfile, time
import jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint, GracefulExit, Progress
from onstep.plots import plot

class Interrupt(Progress):  # what the stop button of a notebook does
    def on_step_end(self, loop):
        super().on_step_end(loop)
        if loop.step == 5:
            signal.raise_signal(signal.SIGINT)

def add(state, batch):
    return state + batch, {"loss": 1 / (state + 1)}

def data(epoch):
    for number in range(8):
        if number == 3 and slow:
            time.sleep(2.5)
        yield 1.0

def engine(directory, progress, *callbacks):
    return Engine(add, [*callbacks, Checkpoint(directory, when=2), progress], log_every=1)

slow = False
one, two = tempfile.mkdtemp(), tempfile.mkdtemp()
engine(one, Progress())
""",
    "engine(one, Interrupt(interval=1e-9)).run(jnp.float32(0), data, epochs=2)",
    "engine(one, Progress()).run(jnp.float32(0), data, epochs=2)",
    "engine(two, Interrupt(interval=1e-9), GracefulExit()).run(jnp.float32(0), data, epochs=2)",
    "result = engine(two, Progress(epoch_lines=True), GracefulExit()).run(jnp.float32(0), data, epochs=2); result",
    "plot(result)",
    "slow = True; Engine(add, [Progress()]).run(jnp.float32(0), data, epochs=1)",
]


@pytest.mark.slow
def test_a_notebook_shows_engines_results_and_plots_and_resumes_after_an_interrupt():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    seen = []
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)
    process = client.process_message

    def remember(message, *args):
        seen.append((message["msg_type"], message["content"].get("data", {}).get("text/plain", "")))
        return process(message, *args)

    client.process_message = remember
    client.execute()
    shown, interrupted, resumed, stopped, resumed_after_stop, drawn, _ = [
        {output.output_type: output for output in cell.outputs} for cell in notebook.cells
    ]
    assert "Progress()" in shown["execute_result"].data["text/html"]
    for cell in (interrupted, stopped):
        assert cell["error"].ename == "KeyboardInterrupt"
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "onstep: resuming from step 4 (epoch 0 of 2)" in texts[2]
    assert "onstep: resuming from step 5 (epoch 0 of 2)" in texts[4]
    assert re.search(r"epoch 1/2  loss \S+  \S+ s\nepoch 2/2  loss \S+  \S+ s\n", texts[4])
    for cell in (resumed, resumed_after_stop):
        html = cell["execute_result"].data["text/html"]
        assert "<b>reached its target</b>, at step 16, epoch 2" in html
        assert html.count("<svg") == 2
    assert "image/png" in drawn["execute_result"].data
    assert any(re.search(r"\nreading the data \(.* in data\)  0:0[12]$", text) for _, text in seen)
    assert not [output for cell in notebook.cells for output in cell.outputs if "reading the data" in str(output)]


def test_it_shows_itself_as_the_call_that_made_it():
    assert repr(Progress()) == "Progress()"
    assert repr(Progress(interval=2.0, metrics=["val/loss"])) == "Progress(interval=2.0, metrics=['val/loss'])"
