"""The HTML of a report: tables, and charts as SVG. It needs no package, no script and no network."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from onstep.plots import COLOURS, DASHES, group_by_chart, line_styles, spans_decades

Points = tuple[Sequence[int], Sequence[float]]
"""Steps, and the value at each."""

SHOWN = 24
"""The number of charts that are shown before the rest is folded, and of rows above which a table is folded."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 220, 58, 14, 14, 24

_DARK = ("#3987e5", "#d95926", "#199e70", "#d55181", "#9085e9", "#c98500", "#30a030", "#e66767")


def _colours(colours: Sequence[str]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))


_STYLE = (
    f"""
:root {{ color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1c2024; --soft: #60666e; --rule: #dfe2e6;
  --good: #157a3e; --bad: #c02b2b; --going: #2a66b8; {_colours(COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #14171a; --card: #1d2125; --ink: #e6e8ea; --soft: #9aa1a9;
  --rule: #343a40; --good: #4cc27b; --bad: #f07070; --going: #6aa5ee; {_colours(_DARK)} }} }}
body {{ margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1240px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
"""
    + """
header { border-left: 6px solid var(--going); padding-left: 1rem; }
header.good { border-color: var(--good); }
header.bad { border-color: var(--bad); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
header p { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }
header.bad p { font: .87em/1.5 ui-monospace, monospace; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .6rem; }
summary { cursor: pointer; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1.4rem 0 0; }
dt, small { color: var(--soft); font-size: .85rem; font-weight: 400; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem .9rem .5rem; background: var(--card); border-radius: 8px; min-width: 0;
  display: flex; flex-direction: column; break-inside: avoid; }
h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
ul { flex: 1; list-style: none; margin: .2rem 0 .4rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem;
  align-content: flex-start; font-size: .85rem; overflow-wrap: anywhere; }
ul svg { width: 20px; height: 8px; }
b { font-weight: 600; font-variant-numeric: tabular-nums; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .dot { stroke-width: 6; stroke-linecap: round; stroke-dasharray: none; }
svg .cross { stroke-dasharray: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.6rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; max-width: 40rem; }
th { color: var(--soft); font-size: .85rem; font-weight: 400; }
td.number, th.number { text-align: right; white-space: nowrap; }
"""
    + "".join(
        [f".c{i} {{ stroke: var(--c{i}) }}\n" for i in range(len(COLOURS))]
        + [f".d{i} {{ stroke-dasharray: {dash or 'none'} }}\n" for i, dash in enumerate(DASHES)]
    )
)


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page. `parts` are HTML, the title is text."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # even a tag that was not escaped loads and runs nothing
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    lines = ("<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *parts, "</body></html>", "")
    return "\n".join(lines)


def heading(title: str, text: str, kind: str, facts: dict[str, str]) -> str:
    """Return the top of a page: how the run ended, why, and facts about it.

    Args:
        title, text: how the run ended, and why.
        kind: `"good"`, `"bad"` or `""`, which decides the colour.
        facts: by name; empty ones are left out.
    """
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items() if fact)
    return f'<header class="{kind}"><h1>{escape(title)}</h1><p>{escape(text)}</p></header><dl>{shown}</dl>'


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a section with a table, `""` without rows. A long table is folded, and numbers are aligned right."""
    rows = list(rows)
    if not rows:
        return ""
    number = [not all(isinstance(cell, str) for cell in column) for column in zip(*rows, strict=True)]

    def row(tag: str, cells: Sequence[Any]) -> str:
        kinds = [' class="number"' if right else "" for right in number]
        texts = [escape(cell if isinstance(cell, str) else _text(cell, 5)) for cell in cells]
        return f"<tr>{''.join(f'<{tag}{k}>{t}</{tag}>' for k, t in zip(kinds, texts, strict=True))}</tr>"

    body = f'<div class="scroll"><table>{row("th", columns)}{"".join(row("td", cells) for cells in rows)}</table></div>'
    if len(rows) > SHOWN:
        return f"<details><summary>{escape(title)} ({len(rows)})</summary>{body}</details>"
    return f"<h2>{escape(title)}</h2>{body}"


def charts(curves: dict[str, Points], units: Mapping[str, str] | None = None) -> str:
    """Return a section with charts of curves by name. If there are many, the last ones are folded.

    Args:
        curves: by name.
        units: by the title of a chart, its unit.
    """
    kinds = {name: f"c{colour} d{dash}" for name, (colour, dash) in line_styles(curves).items()}
    ends = [steps[i] for steps, _ in curves.values() for i in (0, -1)]
    x = _Axis(ends, _LEFT, _WIDTH - _RIGHT, steps=True)
    figures = []
    for title, names in group_by_chart(curves).items():
        for i in range(0, len(names), len(COLOURS)):
            some = {name: (kinds[name], *curves[name]) for name in names[i : i + len(COLOURS)]}
            keys = "".join(
                f'<li><svg viewBox="0 0 20 8"><path class="{kind}" d="M0 4h20"/></svg> {escape(name)} '
                f"<b>{_text(values[-1], 4)}</b></li>"
                for name, (kind, _, values) in some.items()
            )
            chart = _chart(title, list(some.values()), x)
            unit = f" <small>{escape(units[title])}</small>" if units and title in units else ""
            figures.append(f"<figure><h3>{escape(title)}{unit}</h3><ul>{keys}</ul>{chart}</figure>")
    section = f'<h2>Curves</h2><div class="charts">{"".join(figures[:SHOWN]) or "Nothing was recorded."}</div>'
    if more := figures[SHOWN:]:
        section += f'<details><summary>{len(more)} more</summary><div class="charts">{"".join(more)}</div></details>'
    return section


def _chart(title: str, curves: list[tuple[str, Sequence[int], Sequence[float]]], x: _Axis) -> str:
    """One chart as SVG. Where a value is not finite, the curve has a gap with a cross above.

    Args:
        title: for screen readers.
        curves: each with the CSS classes of its line, its steps and its values.
        x: the axis of steps, which all charts share.
    """
    values = [value for _, _, values in curves for value in values if math.isfinite(value)]
    y = _Axis(values, _HEIGHT - _BOTTOM, _TOP, log=spans_decades(values))
    parts = [f'<text x="{_LEFT - 18}" y="{_HEIGHT - 7}" text-anchor="end">step</text>']
    parts += [
        f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>'
        for at, label in y.ticks() * bool(values)
    ]
    parts += [f'<text x="{at:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{label}</text>' for at, label in x.ticks()]
    for kind, *points in curves:
        path, dots, crosses = "", "", ""
        for finite, run in itertools.groupby(zip(*points, strict=True), lambda point: math.isfinite(point[1])):
            places = [(x(step), y(value) if finite else _TOP - 6) for step, value in run]
            if not finite:
                crosses += "".join(f"M{at:.1f} {top}m-3-3l6 6m-6 0l6-6" for at, top in places)
            elif len(places) == 1:
                dots += "M{:.1f} {:.1f}h0".format(*places[0])
            else:
                path += "M" + "L".join(f"{at:.1f} {height:.1f}" for at, height in places)
        drawn = {"": path, " dot": dots, " cross": crosses}
        parts += [f'<path class="{kind}{shape}" d="{d}"/>' for shape, d in drawn.items() if d]
    if not values:
        parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">no finite value</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


class _Axis:
    """Maps numbers to positions in a chart.

    Args:
        values: finite numbers, all of which get a position between `start` and `end`.
        start, end: positions of the ends, in units of the chart.
        log: whether the scale is logarithmic.
        steps: whether the numbers are steps: integers, with the first and the last at the ends.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False, steps: bool = False):
        self.start, self.end, self.log, self.steps = start, end, log, steps
        self.low, self.high = min(map(self._scaled, values), default=0.0), max(map(self._scaled, values), default=1.0)
        size, range_ = max(abs(self.low), abs(self.high)), self.high - self.low
        if steps:
            room = 0.0 if range_ else 1.0
        elif range_ > 1e-5 * size and size > 1e-290:
            room = range_ / 25
        else:  # practically one value
            room = size / 10 if size > 1e-290 else 1.0
        self.low, self.high = self.low - room, self.high + room

    def __call__(self, value: float) -> float:
        return self._place(self._scaled(value))

    def ticks(self) -> list[tuple[float, str]]:
        """Return round numbers: position and text of each."""
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next((n * power for n in (1, 2, 5) if n * power >= rough), 10 * power)
        if self.log or self.steps:
            step = max(1, round(step))
        numbers = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self._place(number), _text(10.0**number if self.log else number)) for number in numbers]

    def _place(self, scaled: float) -> float:
        return self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        value = max(-1e300, min(value, 1e300))  # differences stay finite
        return math.log10(value) if self.log else value


def _text(number: float, digits: int = 7) -> str:
    if isinstance(number, int) or (1000 <= abs(number) < 10**8 and number == round(number)):
        return f"{number:,.0f}"
    text = "NaN" if math.isnan(number) else re.sub(r"e\+?(-?)0*", r"e\1", f"{number:.{digits}g}")
    return text.replace("-", "\N{MINUS SIGN}", 1) if number < 0 else text
