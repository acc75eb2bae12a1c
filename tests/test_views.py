"""HTML views of engines and results, as notebooks show them."""

import math
import re
from xml.etree import ElementTree

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from onstep import Engine, views
from onstep.callbacks import CSV, Checkpoint, Progress
from onstep.testing import LogValues, StopAt


def add(state, batch):
    return state + batch, {"loss": 1 / state}


def cells(html):
    """Return the title and the rows of a view as text; the view must be well-formed."""
    root = ElementTree.fromstring(html)
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    for table in [*root.findall("table"), *root.findall("details")]:
        root.remove(table)
    return "".join(root.itertext()), rows


def test_an_engine_shows_its_arguments_and_each_callback():
    engine = Engine(add, [Progress(interval=2.0), CSV("/tmp/x.csv", name="table")], log_every=5)

    @engine.on("epoch_end")
    def show(loop):
        pass

    title, rows = cells(engine._repr_html_())
    assert title == "Engine(add, log_every=5)"
    assert rows == [
        ["callback", ""],
        ["Progress", "Progress(interval=2.0)"],
        ["table", "CSV('/tmp/x.csv', name='table')"],
        ["show", repr(engine.callbacks["show"])],
    ]


def test_an_engine_without_callbacks_has_no_table():
    assert Engine(add)._repr_html_() == "<div><code>Engine(add)</code></div>"


@pytest.mark.parametrize(
    ("callbacks", "how"),
    [
        ([], "reached its target, at step 4, epoch 2"),
        ([StopAt(3, reason="<enough>, token=abc123")], "stopped: <enough>, token=***, at step 3, epoch 1"),
    ],
    ids=["finished", "stopped"],
)
def test_a_result_shows_how_the_run_ended_and_the_last_values(callbacks, how):
    result = Engine(add, callbacks, log_every=1).run(jnp.float32(1), [1.0, 1.0], epochs=2)
    title, (heads, *rows) = cells(result._repr_html_())
    assert (title, heads) == (how, ["metric", "last", "curve"])
    shown = {name: float(last) for name, last, _ in rows}
    assert shown == pytest.approx(dict(result.latest), rel=1e-4)
    assert result._repr_html_().count("<svg") == len(rows)


def test_a_value_from_before_a_resume_has_no_curve():
    engine = Engine(add, [LogValues({1: {"val/loss": 0.5}})])
    first = engine.run(jnp.float32(1), [1.0, 1.0], epochs=1)
    _, rows = cells(engine.run(first, [1.0, 1.0], epochs=2)._repr_html_())
    assert ["val/loss", "0.5", ""] in rows


def test_many_rows_are_folded():
    values = LogValues({1: {f"many/{i}": i for i in range(30)}})
    html = Engine(add, [values]).run(jnp.float32(1), [1.0], epochs=1)._repr_html_()
    shown, folded = html.split("<details><summary>20 more</summary>")
    assert (shown.count("<tr>"), folded.count("<tr>")) == (13, 21)
    cells(html)


def test_texts_are_escaped():
    result = Engine(add, [LogValues({1: {"<script>": 1.0}})]).run(jnp.float32(1), [1.0], epochs=1)
    engine = Engine(add, [StopAt(2, reason="<script>")])
    for html in (result._repr_html_(), engine._repr_html_()):
        assert "&lt;script&gt;" in html
        assert "<script" not in html


def test_secrets_are_not_shown(tmp_path):
    html = Engine(add, [Checkpoint(tmp_path / "token=abc123")])._repr_html_()
    assert "abc123" not in html


def points(svg):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([^ ]+) ([\d.-]+)", svg)]


def test_a_curve_has_gaps_dots_and_its_range_as_a_title():
    svg = views.curve([1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 4.0, math.inf])
    assert (svg.count("M"), svg.count("L"), svg.count("h0")) == (2, 1, 1)
    assert "from 1 to 4, lowest 1, highest 4<" in svg
    assert views.curve([1], [math.nan]) == ""


def test_a_curve_that_spans_decades_is_logarithmic():
    heights = [y for _, y in points(views.curve([1, 2, 3], [1.0, 10.0, 100.0]))]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert "logarithmic" in views.curve([1, 2, 3], [1.0, 10.0, 100.0])


@settings(deadline=None, database=None, derandomize=True)
@given(st.lists(st.floats(width=64), min_size=1, max_size=500), st.integers(0, 2**31), st.integers(1, 10**6))
@example([1.7e308, -1.7e308], 0, 1)
@example([5e-324, 1.7e308], 0, 1)
def test_any_values_are_drawn_within_a_small_curve_that_ends_with_the_last(values, first, stride):
    svg = views.curve([first + i * stride for i in range(len(values))], values)
    assert len(points(svg)) <= 82
    assert all(0 <= x <= 160 and 0 <= y <= 26 for x, y in points(svg))
    if svg:
        ElementTree.fromstring(svg)
    if math.isfinite(values[-1]) and len(values) > 1:
        assert points(svg)[-1][0] == 157
