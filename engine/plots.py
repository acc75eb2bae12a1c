"""Charts of recorded metrics, drawn by matplotlib, and how their names share charts and colours."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .checks import check_list, local_file
from .records import History
from .result import Result
from .views import COLOURS as COLOURS  # for `from onstep.plots import COLOURS`
from .views import spans_decades as spans_decades

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""The dash patterns of lines: lengths of dashes and gaps in points, empty for a solid line."""


def plot(
    source: History | Result, names: Iterable[str] | None = None, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the metrics that a run recorded, with matplotlib.

    Names that differ only before the first slash share a chart, such as `train/loss` and `val/loss`. The scale is
    logarithmic if the values span two decades or more. To draw a learning rate schedule, use `onstep.config.plot`.

    Args:
        source: a run's result, or its history.
        names: the names to draw; all by default.
        path: an image file to write, such as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure, which a notebook displays.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError: a name was not recorded.
        ValueError: there is no name to draw, `names` is one string, or `path` is a directory or a URL.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state, {"loss": batch, "size": batch}), log_every=1)
    >>> figure = plot(engine.run(jnp.int32(0), [3.0, 2.0, 1.0], epochs=1))
    >>> [axes.get_title() for axes in figure.axes]
    ['loss', 'size']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib: pip install matplotlib ({error})") from error

    class Shown(Figure):
        """A figure that a notebook displays without pyplot, which would display it twice."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    check_list("plot", "names", names)
    file = None if path is None else local_file("plot", path)
    history = source.history if isinstance(source, Result) else source
    names = list(history if names is None else names)
    if not names:
        raise ValueError("plot needs at least one name to draw, but nothing was recorded or requested.")
    charts, styles = group_by_chart(names), line_styles(names)
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Shown(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    for i, (title, members) in enumerate(charts.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=title, xlabel="step")
        for name in members:
            colour, dash = styles[name]
            dashes = tuple(map(float, DASHES[dash].split()))
            (line,) = axes.plot(history.steps(name), history[name], c=COLOURS[colour], ls=(0, dashes), label=name)
            line.set_marker("o" if len(history[name]) == 1 else "")
        if spans_decades([value for name in members for value in history[name]]):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure


def group_by_chart(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of each chart, by its title.

    Names that differ only before the first slash share a chart. Each `time/` name has its own chart, after all others.

    >>> group_by_chart(["train/loss", "time/data", "lr", "val/loss"])
    {'loss': ['train/loss', 'val/loss'], 'lr': ['lr'], 'time/data': ['time/data']}
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.startswith("time/")):
        title = name if name.startswith("time/") else name.partition("/")[2] or name
        groups.setdefault(title, []).append(name)
    return groups


def line_styles(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the style of each name's line, as indices into `COLOURS` and `DASHES`.

    All names with the same first part have the same style, so `val/...` looks the same in every chart.

    >>> line_styles(["train/loss", "val/loss", "train/accuracy", "val/accuracy", "lr"])
    {'train/loss': (0, 0), 'val/loss': (1, 0), 'train/accuracy': (0, 0), 'val/accuracy': (1, 0), 'lr': (0, 0)}
    """
    firsts = {name: name.partition("/")[0] if "/" in name else "" for name in names}
    numbers: dict[str, int] = {}
    for group in group_by_chart(firsts).values():
        for name in group if len(group) > 1 else ():  # a single line in a chart needs no distinct style
            numbers.setdefault(firsts[name], len(numbers))
    places = {name: numbers.get(first, 0) for name, first in firsts.items()}
    return {name: (n % len(COLOURS), n // len(COLOURS) % len(DASHES)) for name, n in places.items()}
