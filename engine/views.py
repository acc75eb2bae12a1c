"""HTML views for notebooks: an engine with its callbacks, and a result with small curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from .records import History
from .redact import without_secrets

COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#e87ba4", "#4a3aa7", "#eda100", "#008300", "#e34948")
"""The colours of lines, in hexadecimal RGB."""

SHOWN = 12
"""Rows of a table that are shown before the rest is folded."""

_WIDTH, _HEIGHT, _EDGE = 160, 26, 3
_POINTS = _WIDTH // 2
"""The most points of a small curve."""


def engine_html(call: str, callbacks: Mapping[str, str]) -> str:
    """Return an engine as HTML.

    Args:
        call: the call that makes it, without the callbacks.
        callbacks: by name, the calls that make them.
    """
    rows = [(escape(name), f"<code>{escape(without_secrets(text))}</code>") for name, text in callbacks.items()]
    return _block(f"<code>{escape(without_secrets(call))}</code>", ("callback", ""), rows)


def result_html(step: int, epoch: int, stopped: str | None, latest: Mapping[str, float], history: History) -> str:
    """Return a result as HTML: how the run ended, the last values, and a small curve of each.

    Args:
        step, epoch, stopped, latest, history: of the result.
    """
    how = "reached its target" if stopped is None else f"stopped: {without_secrets(stopped)}"
    title = f"<b>{escape(how)}</b>, at step {step:,}, epoch {epoch:,}"
    rows = [
        (escape(name), f"{value:.5g}", curve(history.steps(name), history[name]) if name in history else "")
        for name, value in latest.items()
    ]
    return _block(title, ("metric", "last", "curve"), rows)


def curve(steps: Sequence[int], values: Sequence[float]) -> str:
    """Return a small curve as SVG, `""` if no value is finite. Its scale is logarithmic as in `plot`.

    A long curve is drawn with every n-th point, and the last one. Values that are not finite are gaps.
    """
    stride = -(-len(steps) // _POINTS)
    points = list(zip(steps, values, strict=True))
    points = points[:-1:stride] + points[-1:]
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return ""
    log = spans_decades(finite)
    x = _Scale([step for step, _ in points], _EDGE, _WIDTH - _EDGE, log=False)
    y = _Scale(finite, _HEIGHT - _EDGE, _EDGE, log=log)
    paths = []
    for drawn, run in groupby(points, lambda point: math.isfinite(point[1])):
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in run] if drawn else []
        paths += ["M" + "L".join(places) + "h0" * (len(places) == 1)] if places else []
    style = f'fill="none" stroke="{COLOURS[0]}" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round"'
    title = f"<title>from {finite[0]:.5g} to {finite[-1]:.5g}, lowest {min(finite):.5g}, highest {max(finite):.5g}"
    title += f"{', logarithmic' if log else ''}</title>"
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} role="img">{title}<path {style} d="{"".join(paths)}"/></svg>'


def spans_decades(values: Iterable[float]) -> bool:
    """Return whether values need a logarithmic scale: all finite ones are positive and span two decades or more.

    >>> spans_decades([0.5, 20.0, 300.0]), spans_decades([0.5, 20.0]), spans_decades([0.0, 300.0])
    (True, False, False)
    """
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / 100 >= min(finite)


class _Scale:
    """Maps numbers to positions between `start` and `end`; equal numbers to the middle."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool):
        self._log, self._start, self._end = log, start, end
        self._low, self._high = self._of(min(values)), self._of(max(values))

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low) if self._high > self._low else 0.5
        return self._start + share * (self._end - self._start)

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value / 2  # halved, so that differences stay finite


def _block(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a title with a table below, whose last rows are folded if it is long. All texts are HTML."""

    def table(some: Sequence[Sequence[str]]) -> str:
        lines = "".join(f"<tr>{''.join(f'<td{left}>{cell}</td>' for cell in row)}</tr>" for row in some)
        return f"<table><tr>{heads}</tr>{lines}</table>"

    left = ' style="text-align: left"'
    heads = "".join(f"<th{left}>{column}</th>" for column in columns)
    more = f"<details><summary>{len(rows) - SHOWN} more</summary>{table(rows[SHOWN:])}</details>"
    parts = [table(rows[:SHOWN]) * bool(rows), more * (len(rows) > SHOWN)]
    return f"<div>{title}{''.join(parts)}</div>"
