"""Charts of recorded metrics."""

import math
import sys

import jax.numpy as jnp
import pytest
from onstep import Engine, History, Record
from onstep.plots import COLOURS, plot


def history(**values):
    """Return a history of values by name, with `__` for the slash, at steps 1, 2, ..."""
    made = History()
    for name, numbers in values.items():
        for i, number in enumerate(numbers):
            made.add(Record(i + 1, 0, {name.replace("__", "/"): number}))
    return made


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_names_that_differ_before_the_slash_share_a_chart():
    figure = plot(history(train__loss=[3.0, 2.0, 1.0], lr=[0.1], val__loss=[4.0]))
    assert [axes.get_title() for axes in figure.axes] == ["loss", "lr"]
    assert lines(figure.axes[0]) == {"train/loss": ([1, 2, 3], [3.0, 2.0, 1.0]), "val/loss": ([1], [4.0])}


def test_a_result_is_drawn_like_its_history():
    result = Engine(lambda s, b: (s + b, {"loss": b}), log_every=1).run(jnp.float32(0), [1.0, 2.0], epochs=1)
    assert lines(plot(result).axes[0]) == lines(plot(result.history).axes[0])
    assert lines(plot(result).axes[0])["train/loss"] == ([1, 2], [1.0, 2.0])


def test_the_names_to_draw_can_be_chosen():
    figure = plot(history(a=[1.0], b=[2.0], c=[3.0]), ["c", "a"])
    assert [axes.get_title() for axes in figure.axes] == ["c", "a"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 100.0], "log"),
        ([1.0, 99.0], "linear"),
        ([0.0, 100.0], "linear"),
        ([1.0, 1e3, math.nan, -math.inf], "log"),
    ],
    ids=str,
)
def test_values_that_span_two_decades_have_a_logarithmic_scale(values, scale):
    assert plot(history(x=values)).axes[0].get_yscale() == scale


def test_a_single_point_is_a_dot():
    markers = [line.get_marker() for line in plot(history(a__x=[1.0], b__x=[1.0, 2.0])).axes[0].lines]
    assert markers == ["o", ""]


def test_names_with_the_same_first_part_have_the_same_colour_in_every_chart():
    figure = plot(history(alone=[1.0], val__a=[1.0], train__a=[1.0], train__b=[1.0], val__b=[1.0]))
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    one, two = COLOURS[:2]
    assert colours == [{"alone": one}, {"val/a": one, "train/a": two}, {"train/b": two, "val/b": one}]


def test_a_figure_can_be_written_and_displayed_in_notebooks(tmp_path):
    figure = plot(history(x=[1.0, 2.0]), path=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == figure._repr_png_()[:4] == b"\x89PNG"


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="plot needs at least one name to draw"):
        plot(history())


def test_an_unknown_name_is_an_error_that_lists_the_known_names():
    with pytest.raises(KeyError, match=r"'los' was not recorded; the history holds \['loss'\]"):
        plot(history(loss=[1.0]), ["los"])


def test_a_missing_matplotlib_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install matplotlib"):
        plot(history(x=[1.0]))
