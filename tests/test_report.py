"""The page about a run, as text; and once in a browser."""

import contextlib
import html
import math
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
from onstep import Callback, Engine, page, processes
from onstep.callbacks import Checkpoint, Report, Timing, report


def add(state, batch):
    return state + batch, {"loss": batch}


class Log(Callback):
    """Logs what a function of the step gives."""

    def __init__(self, values):
        self.values = values

    def on_step_end(self, loop):
        loop.log(self.values(loop.step))


def run(path, *callbacks, steps=4, config=None, when=None, **options):
    """The page of a run."""
    with_report = [Report(path, config=config, when=when), *callbacks]
    Engine(add, with_report, **options).run(jnp.float32(0), [1.0] * steps, epochs=1)
    return path.read_text()


def lines(page):
    """What a reader sees of it, with each row of a table on one line."""
    page = re.sub(r"<(title|style)>.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"</(tr|h1|h2|p|div|figure)>", "\n", page)
    shown = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\N{MINUS SIGN}", "-")
    return [" ".join(line.split()) for line in shown.splitlines()]


def figures(page):
    return re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)


def at_two(act):
    """A callback that does something at step 2."""

    class Act(Callback):
        def on_step_end(self, loop):
            if loop.step == 2:
                act(loop)

    return Act()


def fail(loop):
    raise OSError("no space left in <disk>, token=abc123")


def interrupt(loop):
    raise KeyboardInterrupt


ENDS = {
    "finished": (lambda loop: None, "Finished at step 4", "The run reached its target."),
    "stopped": (lambda loop: loop.stop("good enough"), "Stopped at step 2", "good enough"),
    "to be resumed": (lambda loop: loop.stop("SIGINT", final=False), "Stopped at step 2", "SIGINT (to be resumed)"),
    "failed": (
        fail,
        "Failed at step 2",
        "OSError: no space left in <disk>, token=***\nonstep: raised by Act",
    ),
    "interrupted": (interrupt, "Interrupted at step 2", "KeyboardInterrupt"),
}


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_page_says_how_the_run_ended_and_why(tmp_path, end):
    act, title, why = ENDS[end]
    try:
        run(tmp_path / "page.html", at_two(act))
    except (OSError, KeyboardInterrupt):
        assert end in ("failed", "interrupted")
    page = (tmp_path / "page.html").read_text()
    assert f"<title>{title}</title>" in page
    assert f"{title}\n{why}" in "\n".join(lines(page))


def test_a_page_says_step_and_epoch_with_their_targets(tmp_path):
    page = run(tmp_path / "page.html", at_two(lambda loop: loop.stop("enough")), steps=3000)
    assert "step 2 of 3,000" in lines(page)
    assert "epoch 0 of 1" in lines(page)


def test_names_that_differ_before_the_slash_share_a_chart(tmp_path):
    log = Log(lambda step: {"time/loss": 3.0, "val/loss": 2.0, "lr": 0.1})
    page = run(tmp_path / "page.html", log, log_every=1)
    charts = [ElementTree.fromstring(figure) for figure in figures(page)]
    names = [[key.find("svg").tail.strip() for key in chart.iter("li")] for chart in charts]
    assert [chart.find("h3").text for chart in charts] == ["loss", "lr", "time/loss"]
    assert names == [["val/loss", "train/loss", "epoch/loss"], ["lr"], ["time/loss"]]


def test_the_table_has_the_last_and_the_extreme_values_with_their_steps(tmp_path):
    values = [math.nan, 3.0, -1.5, 2.0, math.inf]
    page = run(tmp_path / "page.html", Log(lambda step: {"x": values[step - 1]}), steps=5)
    assert "x inf -1.5 3 3 2 2" in lines(page)
    assert "train/loss 1 1 5 1 5" in lines(page)


def test_values_that_are_not_finite_are_gaps_with_crosses(tmp_path):
    values = [1.0, 2.0, math.nan, 4.0, 5.0, math.inf, 7.0]
    page = run(tmp_path / "page.html", Log(lambda step: {"x": values[step - 1]}), steps=7)
    line, dot, cross = re.findall(r'class="c0 d0( \w+)?" d="([^"]*)"', figures(page)[0])[1:]
    assert (line[0], line[1].count("M"), line[1].count("L")) == ("", 2, 2)
    assert (dot[0], dot[1].count("M")) == (" dot", 1)
    assert (cross[0], cross[1].count("M")) == (" cross", 2)


def test_a_curve_without_a_finite_value_says_so(tmp_path):
    page = run(tmp_path / "page.html", Log(lambda step: {"x": math.nan}))
    assert "x NaN 4" in lines(page)
    assert "no finite value" in figures(page)[0]
    assert "grid" not in figures(page)[0]


def test_values_over_decades_have_a_logarithmic_scale(tmp_path):
    page = run(tmp_path / "page.html", Log(lambda step: {"x": 10.0**step, "y": 10.0 * step}), steps=5)
    logarithmic, linear = ([t.text for t in ElementTree.fromstring(f).iter("text")] for f in figures(page)[:2])
    assert logarithmic[1:6] == ["10", "100", "1,000", "10,000", "100,000"]
    assert linear[1:6] == ["10", "20", "30", "40", "50"]


def test_steps_are_whole_numbers(tmp_path):
    chart = figures(run(tmp_path / "page.html", Log(lambda step: {"x": step}), steps=3))[0]
    assert re.findall(r'text-anchor="middle">([^<]*)', chart) == ["1", "2", "3"]


def test_many_names_are_folded_away(tmp_path):
    page = run(tmp_path / "page.html", Log(lambda step: {f"a/{i}": i for i in range(200)}))
    assert len(figures(page)) == 201
    assert len(figures(page.split("<summary>177 more")[0])) == 24
    assert "<summary>Values (202)</summary>" in page


def test_a_chart_has_no_more_curves_than_colours(tmp_path):
    page = run(tmp_path / "page.html", Log(lambda step: {f"{i}/x": i for i in range(40)} | {"0/y": 0, "8/y": 8}))
    charts = [re.findall(r'<li><svg[^>]*><path class="([^"]*)"', figure) for figure in figures(page)]
    assert [len(kinds) for kinds in charts] == [8, 8, 8, 8, 8, 2, 2]
    assert all(len(set(kinds)) == len(kinds) for kinds in charts)


def test_a_run_without_records_has_a_page(tmp_path):
    Engine(lambda state, batch: (state, {}), [Report(tmp_path / "page.html")]).run(0, [1], epochs=1)
    assert "Nothing was recorded." in (tmp_path / "page.html").read_text()


def test_a_run_that_takes_no_step_writes_no_page(tmp_path):
    def broken(state, batch):
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        Engine(broken, [Report(tmp_path / "runs" / "page.html")]).run(0, [1], epochs=1)
    assert not any(tmp_path.iterdir())


def test_other_processes_than_the_first_write_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    with pytest.raises(FileNotFoundError, match="page.html"):
        run(tmp_path / "page.html")


def test_text_is_text_wherever_it_comes_from(tmp_path):
    evil = "<script>alert('x')</script>\ud800"
    stop = at_two(lambda loop: loop.stop(evil))
    page = run(tmp_path / "page.html", Log(lambda step: {evil: 1.0, f"a/{evil}": 1.0}), stop, config={evil: evil})
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 9
    assert "<script" not in page


def test_a_page_is_written_when_asked_for_as_well(tmp_path):
    seen = []
    look = Log(lambda step: seen.append((tmp_path / "page.html").read_text() if step > 2 else "") or {})
    run(tmp_path / "page.html", look, steps=5, when=2, log_every=1)
    assert [re.findall("<h1>(.*?)</h1>", page) for page in seen[2:]] == [
        ["Running, at step 2"],
        ["Running, at step 2"],
        ["Running, at step 4"],
    ]
    assert "train/loss 1 1 1 1 1" in lines(seen[-1])


def test_a_page_is_replaced_as_a_whole(tmp_path):
    first = run(tmp_path / "page.html", steps=2)
    with open(tmp_path / "page.html") as before:
        second = run(tmp_path / "page.html", steps=3)
        assert before.read() == first
    assert "Finished at step 3" in second
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_leaves_nothing_and_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        run(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def kill(loop):
    raise MemoryError("killed")


@pytest.mark.parametrize(
    ("end", "cut", "begin"),
    [(lambda loop: loop.stop("signal", final=False), 5, 5), (kill, 7, 6), (kill, 9, 8)],
    ids=["stopped", "killed", "killed in another epoch"],
)
def test_a_resumed_run_has_the_charts_of_one_that_was_never_interrupted(tmp_path, end, cut, begin):
    def go(name, end=None):
        log = Log(lambda step: {"val/loss": step**2} if step % 3 == 0 else {})
        engine = Engine(add, [Report(tmp_path / name), Checkpoint(tmp_path / f"{name}.run", when=2), log], log_every=2)

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
    assert f"sittings 2, the last from step {begin}" in lines(resumed)
    assert "sittings" not in whole


def test_another_run_of_the_same_report_starts_afresh(tmp_path):
    engine = Engine(add, [Report(tmp_path / "page.html")])
    for value in (9.0, 1.0):
        engine.run(jnp.float32(0), [value] * 3, epochs=1)
    assert "train/loss 1 1 3 1 3" in lines((tmp_path / "page.html").read_text())


@pytest.mark.parametrize("cut", [0, 1, 999, 1000, 1001, 2001, 4321])
def test_a_long_curve_is_thinned_by_the_number_of_its_points_alone(cut):
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


def test_a_report_keeps_a_thousand_points_of_a_name():
    kept = report.Curve()
    most = 0
    for step in range(10_000):
        kept.add(step, 1.0)
        most = max(most, len(kept.steps))
    assert most == 1000


@pytest.fixture
def clock(monkeypatch):
    """The time that a report sees."""
    clock = SimpleNamespace(now=0)
    timely = SimpleNamespace(monotonic=lambda: clock.now, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(report, "time", timely)
    return clock


def test_the_wall_time_is_that_of_all_sittings(tmp_path, clock):
    log = Log(lambda step: setattr(clock, "now", clock.now + 40) or {})
    engine = Engine(add, [Report(tmp_path / "page.html"), log])
    first = engine.run(jnp.float32(0), [1.0], epochs=1)
    assert "wall time 40.0 s" in lines((tmp_path / "page.html").read_text())
    clock.now += 1000
    engine.run(first, [1.0], epochs=4)
    assert "wall time 2 min 40 s" in lines((tmp_path / "page.html").read_text())


def test_the_time_is_shared_out_as_timing_recorded_it(tmp_path, clock):
    def values(step):
        clock.now = 10 * step
        if step == 3:  # nothing since step 0, three steps in 15 s
            return {"time/steps_per_second": 0.2, "time/data": 0.2, "time/callbacks": 0.4}
        if step == 4:  # one step in 5 s
            return {"time/steps_per_second": 0.2, "time/data": 0.8, "time/callbacks": 0}
        return {"time/data": 0.5}

    shown = lines(run(tmp_path / "page.html", Log(values), steps=5))
    assert shown[shown.index("part seconds %") + 1 :][:4] == [
        "steps 7 14",
        "waiting for data 7 14",
        "callbacks 6 12",
        "not measured: compiling, beginnings, ends 30 60",
    ]


def test_timing_records_what_a_report_needs(tmp_path):
    assert "waiting for data" in run(tmp_path / "page.html", Timing(table=False))


def test_the_checkpoints_are_listed_with_size_and_the_best(tmp_path):
    log = Log(lambda step: {"val/loss": abs(step - 2)})
    page = run(tmp_path / "page.html", Checkpoint(tmp_path / "run", when=1, keep=3, best="val/loss"), log)
    shown = lines(page)
    header, *rows = (line.split() for line in shown[shown.index("Checkpoints in run") + 1 :][:4])
    assert header == ["step", "MB", "val/loss"]
    assert [(step, *rest) for step, _, *rest in rows] == [("2", "0", "best"), ("3", "1"), ("4", "2")]
    assert all(0 < float(size) < 1 for _, size, *_ in rows)


def test_a_damaged_checkpoint_is_said_to_be(tmp_path):
    def damage(loop):
        (tmp_path / "run" / "1" / "manifest.json").write_text("{}")

    checkpoint = Checkpoint(tmp_path / "run", when=1)
    page = run(tmp_path / "page.html", checkpoint, at_two(lambda loop: checkpoint._storage.wait() or damage(loop)))
    assert "1 damaged" in lines(page)


def test_the_configuration_is_shown_without_secrets(tmp_path):
    page = run(tmp_path / "page.html", config={"optimizer": {"name": "adam", "rate": 1e-3}, "api_key": "sk-1234"})
    assert "optimizer.name adam" in lines(page)
    assert "optimizer.rate 0.001" in lines(page)
    assert "api_key ***" in lines(page)
    assert "Configuration" not in run(tmp_path / "page.html")


def test_a_configuration_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="config needs a dict, a dataclass or a pydantic model, got str"):
        Report(tmp_path / "page.html", config="rate=1")


def test_the_environment_names_versions_and_devices_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("ONSTEP_TEST", "from-the-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", "--from-the-arguments"])
    page = run(tmp_path / "page.html", Checkpoint(tmp_path / "run"))
    assert f"jax {jax.__version__}" in lines(page)
    for package in ("Python", "onstep", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint"):
        assert f"<td>{package}</td>" in page
    assert f"devices {jax.device_count()} x {jax.devices()[0].device_kind}" in lines(page)
    for private in ("from-the-environment", "from-the-arguments", str(tmp_path)):
        assert private not in page


def test_a_page_loads_nothing_and_runs_nothing(tmp_path):
    page = run(tmp_path / "page.html", Log(lambda step: {"x": step}))
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
def test_whatever_was_recorded_is_drawn_within_its_chart(values, first, stride):
    drawn = page.charts({name: ([first + i * stride for i in range(len(v))], v) for name, v in values.items()})
    for chart in (ElementTree.fromstring(figure).find("svg") for figure in figures(drawn)):
        width, height = map(float, chart.get("viewBox").split()[2:])
        for x, y in re.findall(r"[ML]([^ ]+) ([\d.-]+)", " ".join(path.get("d") for path in chart.iter("path"))):
            assert 0 <= float(x.split("H")[0]) <= width
            assert 0 <= float(y.split("H")[0]) <= height
        labels = [label.text for label in chart.iter("text")]
        assert all(labels.count(label) <= 2 for label in labels)  # 2: on either axis once
        for label in chart.iter("text"):
            assert 0 <= float(label.get("x")) <= width
            assert 0 <= float(label.get("y")) <= height + 4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")
def test_a_browser_shows_the_page_without_an_error(tmp_path):
    run(tmp_path / "page.html", Log(lambda step: {"<b>x": step, "y": math.nan}), config={"a": "<img src=http://x.y>"})
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        *(f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr  # where the page's own policy would tell of anything it loads
    assert done.stdout.count("<figure>") == 3
    assert "<img" not in done.stdout
