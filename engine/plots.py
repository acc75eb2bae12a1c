"""Charts of what was recorded, by matplotlib."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .records import History
from .result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#e87ba4", "#4a3aa7", "#eda100", "#008300", "#e34948")
DASHES = ("", "6 3", "2 2", "8 3 2 3")


def plot(
    source: History | Result, names: Iterable[str] | None = None, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws what a run recorded, by matplotlib; `onstep.config.plot` draws schedules.

    Names that are the same after their first slash share a chart, as `train/loss` and `val/loss`
    do. A scale is logarithmic where the values span two decades or more.

    Args:
        source: a run's result, or its history.
        names: those to draw; all without.
        path: an image file to write as well, such as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ImportError: matplotlib is missing.
        KeyError: a name was not recorded.
        ValueError: there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib: pip install 'onstep[config]' ({error}).") from error

    class Shown(Figure):
        """As a notebook shows it without pyplot, which would show it twice."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    history = source.history if isinstance(source, Result) else source
    names = list(history if names is None else names)
    if not names:
        raise ValueError("plot needs something to draw, but no name was recorded or asked for.")
    charts, kinds = group_by_chart(names), line_styles(names)
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Shown(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    for i, (title, members) in enumerate(charts.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=title, xlabel="step")
        for name in members:
            colour, dash = kinds[name]
            dashes = tuple(map(float, DASHES[dash].split()))
            (line,) = axes.plot(history.steps(name), history[name], c=COLOURS[colour], ls=(0, dashes), label=name)
            line.set_marker("o" if len(history[name]) == 1 else "")
        if spans_decades([value for name in members for value in history[name]]):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def group_by_chart(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what follows their first slash; those of `time/` by themselves, and last."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.startswith("time/")):
        title = name if name.startswith("time/") else name.partition("/")[2] or name
        groups.setdefault(title, []).append(name)
    return groups


def line_styles(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The colour and the dashes of each name, as indices: the same for all with the same first part."""
    firsts = {name: name.partition("/")[0] if "/" in name else "" for name in names}
    numbers: dict[str, int] = {}
    for group in group_by_chart(firsts).values():
        for name in group if len(group) > 1 else ():  # alone in a chart one needs no colour of its own
            numbers.setdefault(firsts[name], len(numbers))
    places = {name: numbers.get(first, 0) for name, first in firsts.items()}
    return {name: (n % len(COLOURS), n // len(COLOURS) % len(DASHES)) for name, n in places.items()}


def spans_decades(values: Iterable[float]) -> bool:
    """Whether finite values are all above 0 and the greatest is 100 times the least or more."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / 100 >= min(finite)
