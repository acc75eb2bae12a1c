"""Report: the page as text, and once in a browser."""

import contextlib
import html
import math
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from onstep import Engine, processes
from onstep.callbacks import Checkpoint, Report, Timing, report
from onstep.callbacks._support import page
from onstep.testing import FakeClock, LogValues, RaiseIn, StopAt


def add(state, batch):
    return state + batch, {"loss": batch}


def log(values, steps=4):
    """Log what a function of the step returns, at every step."""
    return LogValues({step: values(step) for step in range(1, steps + 1)})


def run(path, *callbacks, steps=4, config=None, when=None, **options):
    """Run a few steps with a Report, and return its page."""
    with_report = [Report(path, config=config, when=when), *callbacks]
    Engine(add, with_report, **options).run(jnp.float32(0), [1.0] * steps, epochs=1)
    return path.read_text()


def lines(page):
    """Return what a reader sees of a page, with each row of a table on one line."""
    page = re.sub(r"<(title|style)>.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"</(tr|h1|h2|p|div|figure)>", "\n", page)
    shown = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\N{MINUS SIGN}", "-")
    return [" ".join(line.split()) for line in shown.splitlines()]


def figures(page):
    return re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)


ENDS = {
    "finished": ((), "Finished at step 4", "The run reached its target."),
    "stopped": ((StopAt, 2, {"reason": "good enough"}), "Stopped at step 2", "good enough"),
    "resumable": (
        (StopAt, 2, {"reason": "SIGINT", "final": False}),
        "Stopped at step 2",
        "SIGINT (resumable)",
    ),
    "failed": (
        (RaiseIn, "step_end", OSError("no space left in <disk>, token=abc123"), {"step": 2}),
        "Failed at step 2",
        "OSError: no space left in <disk>, token=***\nonstep: raised by RaiseIn",
    ),
    "interrupted": (
        (RaiseIn, "step_end", KeyboardInterrupt(), {"step": 2}),
        "Interrupted at step 2",
        "KeyboardInterrupt",
    ),
}


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_page_says_how_the_run_ended_and_why(tmp_path, end):
    callback, title, why = ENDS[end]
    callbacks = [callback[0](*callback[1:-1], **callback[-1])] if callback else []
    try:
        run(tmp_path / "page.html", *callbacks)
    except (OSError, KeyboardInterrupt):
        assert end in ("failed", "interrupted")
    page = (tmp_path / "page.html").read_text()
    assert f"<title>page: {title}</title>" in page
    assert f"{title}\n{why}" in "\n".join(lines(page))


def test_page_shows_step_and_epoch_with_their_targets(tmp_path):
    page = run(tmp_path / "page.html", StopAt(2), steps=3000)
    assert "step 2 of 3,000" in lines(page)
    assert "epoch 0 of 1" in lines(page)


def test_names_that_differ_only_before_the_slash_share_a_chart(tmp_path):
    values = log(lambda step: {"time/loss": 3.0, "val/loss": 2.0, "lr": 0.1})
    page = run(tmp_path / "page.html", values, log_every=1)
    charts = [ElementTree.fromstring(figure) for figure in figures(page)]
    names = [[key.find("svg").tail.strip() for key in chart.iter("li")] for chart in charts]
    assert [chart.find("h3").text for chart in charts] == ["loss", "lr", "time/loss"]
    assert names == [["val/loss", "train/loss", "epoch/loss"], ["lr"], ["time/loss"]]


def test_table_shows_last_and_extreme_values_with_their_steps(tmp_path):
    values = [math.nan, 3.0, -1.5, 2.0, math.inf]
    page = run(tmp_path / "page.html", log(lambda step: {"x": values[step - 1]}, 5), steps=5)
    assert "x inf -1.5 3 3 2 2" in lines(page)
    assert "train/loss 1 1 5 1 5" in lines(page)


def test_values_that_are_not_finite_become_gaps_with_crosses(tmp_path):
    values = [1.0, 2.0, math.nan, 4.0, 5.0, math.inf, 7.0]
    page = run(tmp_path / "page.html", log(lambda step: {"x": values[step - 1]}, 7), steps=7)
    line, dot, cross = re.findall(r'class="c0 d0( \w+)?" d="([^"]*)"', figures(page)[0])[1:]
    assert (line[0], line[1].count("M"), line[1].count("L")) == ("", 2, 2)
    assert (dot[0], dot[1].count("M")) == (" dot", 1)
    assert (cross[0], cross[1].count("M")) == (" cross", 2)


def test_curve_without_a_finite_value_says_so(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {"x": math.nan}))
    assert "x NaN 4" in lines(page)
    assert "no finite value" in figures(page)[0]
    assert "grid" not in figures(page)[0]


def test_values_that_span_decades_have_a_logarithmic_scale(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {"x": 10.0**step, "y": 10.0 * step}, 5), steps=5)
    logarithmic, linear = ([t.text for t in ElementTree.fromstring(f).iter("text")] for f in figures(page)[:2])
    assert logarithmic[1:6] == ["10", "100", "1,000", "10,000", "100,000"]
    assert linear[1:6] == ["10", "20", "30", "40", "50"]


def test_ticks_of_the_step_axis_are_integers(tmp_path):
    chart = figures(run(tmp_path / "page.html", log(lambda step: {"x": step}, 3), steps=3))[0]
    assert re.findall(r'text-anchor="middle">([^<]*)', chart) == ["1", "2", "3"]


def test_many_charts_and_rows_are_folded(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {f"a/{i}": i for i in range(200)}))
    assert len(figures(page)) == 201
    assert len(figures(page.split("<summary>177 more")[0])) == 24
    assert "<summary>Values (202)</summary>" in page


def test_chart_has_at_most_as_many_curves_as_colours(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {f"{i}/x": i for i in range(40)} | {"0/y": 0, "8/y": 8}))
    charts = [re.findall(r'<li><svg[^>]*><path class="([^"]*)"', figure) for figure in figures(page)]
    assert [len(kinds) for kinds in charts] == [8, 8, 8, 8, 8, 2, 2]
    assert all(len(set(kinds)) == len(kinds) for kinds in charts)


def test_run_without_records_has_a_page(tmp_path):
    Engine(lambda state, batch: (state, {}), [Report(tmp_path / "page.html")]).run(0, [1], epochs=1)
    assert "Nothing was recorded." in (tmp_path / "page.html").read_text()


def test_run_that_takes_no_step_writes_no_page(tmp_path):
    def broken(state, batch):
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        Engine(broken, [Report(tmp_path / "runs" / "page.html")]).run(0, [1], epochs=1)
    assert not any(tmp_path.iterdir())


def test_only_the_first_process_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    with pytest.raises(FileNotFoundError, match="page.html"):
        run(tmp_path / "page.html")


def test_text_is_escaped_wherever_it_comes_from(tmp_path):
    evil = "<script>alert('x')</script>\ud800"
    values = log(lambda step: {evil: 1.0, f"a/{evil}": 1.0})
    page = run(tmp_path / "page.html", values, StopAt(2, reason=evil), config={evil: evil})
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 9
    assert "<script" not in page


def test_page_is_also_written_during_the_run_if_requested(tmp_path):
    engine, seen = Engine(add, [Report(tmp_path / "page.html", when=2)], log_every=1), []

    @engine.on("step_end")
    def look(loop):
        seen.append((tmp_path / "page.html").read_text() if loop.step > 2 else "")

    engine.run(jnp.float32(0), [1.0] * 5, epochs=1)
    assert [re.findall("<h1>(.*?)</h1>", page) for page in seen[2:]] == [
        ["Running, at step 2"],
        ["Running, at step 2"],
        ["Running, at step 4"],
    ]
    assert "train/loss 1 1 1 1 1" in lines(seen[-1])


def test_page_is_replaced_atomically(tmp_path):
    first = run(tmp_path / "page.html", steps=2)
    with open(tmp_path / "page.html") as before:
        second = run(tmp_path / "page.html", steps=3)
        assert before.read() == first
    assert "Finished at step 3" in second
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_page_that_cannot_be_written_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    def replace(old, new):
        raise OSError(f"cannot write {new}")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"cannot write .*report\.html"):
        run(tmp_path / "report.html")
    assert not any(tmp_path.iterdir())


def kill(loop):
    raise MemoryError("killed")


@pytest.mark.parametrize(
    ("end", "cut", "begin"),
    [(lambda loop: loop.stop("signal", final=False), 5, 5), (kill, 7, 6), (kill, 9, 8)],
    ids=["stopped", "killed", "killed in another epoch"],
)
def test_resumed_run_has_the_charts_of_an_uninterrupted_one(tmp_path, end, cut, begin):
    def go(name, end=None):
        values = LogValues({step: {"val/loss": step**2} for step in (3, 6, 9, 12)})
        checkpoint = Checkpoint(tmp_path / f"{name}.run", when=2)
        engine = Engine(add, [Report(tmp_path / name), checkpoint, values], log_every=2)

        @engine.on("step_end")
        def act(loop):
            if end and loop.step == cut:
                end(loop)

        engine.run(jnp.float32(0), [1.0, 2.0, 3.0, 4.0], epochs=3)
        return (tmp_path / name).read_text()

    whole = go("whole")
    with contextlib.suppress(MemoryError):
        go("cut", end)
    resumed = go("cut")
    assert figures(resumed) == figures(whole)
    assert f"sessions 2, the last from step {begin}" in lines(resumed)
    assert "sessions" not in whole


def test_another_run_with_the_same_report_starts_from_scratch(tmp_path):
    engine = Engine(add, [Report(tmp_path / "page.html")])
    for value in (9.0, 1.0):
        engine.run(jnp.float32(0), [value] * 3, epochs=1)
    assert "train/loss 1 1 3 1 3" in lines((tmp_path / "page.html").read_text())


@pytest.mark.parametrize("cut", [0, 1, 999, 1000, 1001, 2001, 4321])
def test_which_points_of_a_long_curve_are_kept_depends_only_on_their_number(cut):
    whole, first = report.Curve(), report.Curve()
    for step in range(5000):
        whole.add(step, float(step))
        if step < cut:
            first.add(step, float(step))
    rest = report.Curve(**vars(first))
    for step in range(cut, 5000):
        rest.add(step, float(step))
    assert rest.points() == whole.points()
    assert whole.points()[0] == [*range(0, 5000, 8), 4999]


def test_report_keeps_at_most_a_thousand_points_of_a_curve():
    kept = report.Curve()
    most = 0
    for step in range(10_000):
        kept.add(step, 1.0)
        most = max(most, len(kept.steps))
    assert most == 1000


@pytest.fixture
def clock(monkeypatch):
    """The clock that a report reads."""
    clock = FakeClock()
    fake = SimpleNamespace(monotonic=clock, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(report, "time", fake)
    return clock


def test_wall_time_covers_all_sessions(tmp_path, clock):
    engine = Engine(add, [Report(tmp_path / "page.html")])
    engine.on("step_end")(lambda loop: clock.advance(40))
    first = engine.run(jnp.float32(0), [1.0], epochs=1)
    assert "wall time 40.0 s" in lines((tmp_path / "page.html").read_text())
    clock.advance(1000)
    engine.run(first, [1.0], epochs=4)
    assert "wall time 2 min 40 s" in lines((tmp_path / "page.html").read_text())


def test_time_is_divided_as_timing_recorded_it(tmp_path, clock):
    def values(step):
        if step == 3:  # three steps in 15 s
            return {"time/steps_per_second": 0.2, "time/data": 0.2, "time/callbacks": 0.4}
        if step == 4:  # one step in 5 s
            return {"time/steps_per_second": 0.2, "time/data": 0.8, "time/callbacks": 0}
        return {"time/data": 0.5}

    engine = Engine(add, [Report(tmp_path / "page.html"), log(values, 5)])
    engine.on("step_end")(lambda loop: clock.advance(10))
    engine.run(jnp.float32(0), [1.0] * 5, epochs=1)
    shown = lines((tmp_path / "page.html").read_text())
    assert shown[shown.index("part seconds %") + 1 :][:4] == [
        "steps 7 14",
        "waiting for data 7 14",
        "callbacks 6 12",
        "not measured: compiling, start, end 30 60",
    ]


def test_compiling_has_its_own_part_of_the_time_if_it_is_recorded(tmp_path, clock):
    values = {"time/steps_per_second": 0.2, "time/data": 0.2, "time/callbacks": 0.4}
    callbacks = [Report(tmp_path / "page.html"), LogValues({2: values | {"time/compiling": 6.0}, 4: values})]
    engine = Engine(add, callbacks)
    engine.on("step_end")(lambda loop: clock.advance(10))
    engine.run(jnp.float32(0), [1.0] * 4, epochs=1)
    shown = lines((tmp_path / "page.html").read_text())
    assert shown[shown.index("part seconds %") + 1 :][:5] == [
        "steps 8 20",
        "waiting for data 4 10",
        "callbacks 8 20",
        "compiling 6 15",
        "not measured: start, end 14 35",
    ]


def test_timing_records_the_values_that_a_report_needs(tmp_path):
    page = run(tmp_path / "page.html", Timing(table=False))
    assert all(part in page for part in ("waiting for data", "<td>compiling</td>", "not measured: start, end"))


def test_shares_have_their_unit_in_charts_and_values(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {"time/data": 0.5, "time/steps_per_second": 2.0}))
    assert "time/data (share of the time) 0.5 0.5 1 0.5 1" in lines(page)
    assert "<h3>time/data <small>share of the time</small></h3>" in page
    assert "<h3>time/steps_per_second</h3>" in page


@pytest.mark.parametrize("file", ["digits/report.html", "digits/index.html", "digits.html"])
def test_page_is_named_after_its_file_or_folder(tmp_path, file):
    run(tmp_path / file)
    page = (tmp_path / file).read_text()
    assert "<title>digits: Finished at step 4</title>" in page
    assert "run digits" in lines(page)


def listed(page):
    """Return the table of checkpoints, as words."""
    shown = lines(page)
    table = shown[shown.index("Checkpoints in run") + 1 :]
    return [line.split() for line in table[: table.index("")]]


def test_checkpoints_are_listed_with_their_size_and_the_best(tmp_path):
    values = log(lambda step: {"val/loss": abs(step - 2)})
    page = run(tmp_path / "page.html", Checkpoint(tmp_path / "run", when=1, keep=3, best="val/loss"), values)
    header, *rows = listed(page)
    assert header == ["step", "MB", "val/loss"]
    assert [(step, *rest) for step, _, *rest in rows] == [("2", "0", "best"), ("3", "1"), ("4", "2")]
    assert all(0 < float(size) < 1 for _, size, *_ in rows)


def test_checkpoints_are_listed_if_the_report_comes_after_checkpoint(tmp_path):
    callbacks = [Checkpoint(tmp_path / "run", when=1, keep=9), Report(tmp_path / "page.html")]
    Engine(add, callbacks).run(jnp.float32(0), [1.0] * 4, epochs=1)
    rows = listed((tmp_path / "page.html").read_text())
    assert [row[0] for row in rows][:4] == ["step", "1", "2", "3"]  # the save of step 4 may not be complete yet


def test_damaged_checkpoint_is_marked(tmp_path):
    engine = Engine(add, [Report(tmp_path / "page.html"), Checkpoint(tmp_path / "run", when=1)])

    @engine.on("step_end", when=2)
    def damage(loop):
        (checkpoints,) = loop.checkpoints
        while not checkpoints.steps():  # it is committed in the background
            time.sleep(0.001)
        (tmp_path / "run" / "1" / "manifest.json").write_text("{}")

    engine.run(jnp.float32(0), [1.0] * 2, epochs=1)
    assert "1 damaged" in lines((tmp_path / "page.html").read_text())


def test_state_that_version_0_1_saved_is_restored(tmp_path):
    one, other = Report(tmp_path / "one.html"), Report(tmp_path / "other.html")
    state = one.get_state() | {"sessions": 3, "seconds": 1.5}
    old = {("sittings" if key == "sessions" else key): value for key, value in state.items()}
    for saved in (state, old):
        other.set_state(saved)
        assert other.get_state() == state


def test_configuration_is_shown_without_secrets(tmp_path):
    page = run(tmp_path / "page.html", config={"optimizer": {"name": "adam", "rate": 1e-3}, "api_key": "sk-1234"})
    assert "optimizer.name adam" in lines(page)
    assert "optimizer.rate 0.001" in lines(page)
    assert "api_key ***" in lines(page)
    assert "Configuration" not in run(tmp_path / "page.html")


def test_configuration_of_another_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match="config needs a dict, a dataclass or a pydantic model, got str"):
        Report(tmp_path / "page.html", config="rate=1")


def test_environment_shows_versions_and_devices_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("ONSTEP_TEST", "from-the-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", "--from-the-arguments"])
    page = run(tmp_path / "page.html", Checkpoint(tmp_path / "run"))
    assert f"jax {jax.__version__}" in lines(page)
    for package in ("Python", "onstep", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint"):
        assert f"<td>{package}</td>" in page
    assert f"devices {jax.device_count()} x {jax.devices()[0].device_kind}" in lines(page)
    for private in ("from-the-environment", "from-the-arguments", str(tmp_path)):
        assert private not in page


def test_page_loads_nothing_and_runs_nothing(tmp_path):
    page = run(tmp_path / "page.html", log(lambda step: {"x": step}))
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link|<iframe|\son\w+=", page)
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


numbers = st.floats(width=64) | st.floats(-10, 10) | st.sampled_from([0.0, -0.0, 5e-324, 1.7e308, 1.0, 1 + 1e-9])
curves = st.dictionaries(
    st.text(st.characters(codec="ascii", min_codepoint=32), max_size=8),
    st.lists(numbers, min_size=1, max_size=20),
    max_size=10,
)


@settings(deadline=None, database=None, derandomize=True)
@given(curves, st.integers(0, 2**31), st.integers(1, 10**6))
def test_any_values_are_drawn_within_their_chart(values, first, stride):
    drawn = page.charts({name: ([first + i * stride for i in range(len(v))], v) for name, v in values.items()})
    for chart in (ElementTree.fromstring(figure).find("svg") for figure in figures(drawn)):
        width, height = map(float, chart.get("viewBox").split()[2:])
        for x, y in re.findall(r"[ML]([^ ]+) ([\d.-]+)", " ".join(path.get("d") for path in chart.iter("path"))):
            assert 0 <= float(x.split("H")[0]) <= width
            assert 0 <= float(y.split("H")[0]) <= height
        labels = [label.text for label in chart.iter("text")]
        assert all(labels.count(label) <= 2 for label in labels)  # 2: once on either axis
        for label in chart.iter("text"):
            assert 0 <= float(label.get("x")) <= width
            assert 0 <= float(label.get("y")) <= height + 4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")
def test_browser_shows_the_page_without_an_error(tmp_path):
    run(tmp_path / "page.html", log(lambda step: {"<b>x": step, "y": math.nan}), config={"a": "<img src=http://x.y>"})
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        *(f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr  # the page's policy would report here what it loads
    assert done.stdout.count("<figure>") == 3
    assert "<img" not in done.stdout


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Report("/runs/page.html"), "Report('/runs/page.html')"),
        (lambda: Report("/page.html", config={"lr": 1}, when=5), "Report('/page.html', config={'lr': 1}, when=5)"),
    ],
    ids=["defaults", "options"],
)
def test_repr_is_the_call_that_makes_the_report(make, expected):
    assert repr(make()) == expected
