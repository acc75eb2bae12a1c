"""The text of progress lines: what they hold, and what they leave out if they are too long."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .terminal import width


@dataclass(frozen=True)
class Part:
    """The content of one line.

    Attributes:
        label: what it is about.
        share: how much of the bar is filled, from 0 to 1; None for no bar.
        facts: the position, then rates, then times.
        values: metrics with their names.
        first: the indices of the values that are left out last, the most important one first.
    """

    label: str
    share: float | None
    facts: Sequence[str]
    values: Sequence[str] = ()
    first: Sequence[int] = ()


def bars(parts: Sequence[Part], columns: int, smooth: bool) -> list[str]:
    """Return a line for each part, each narrower than `columns`, with their bars below each other.

    >>> part = Part("epoch 1/3", 0.5, ["step 4/8", "9.00 steps/s", "0:02 left"], ["val/accuracy 0.9", "loss 0.5"], [1])
    >>> for columns in (80, 40, 30, 20, 10):
    ...     print(*bars([part], columns, smooth=False))
    epoch 1/3 |##   | step 4/8  9.00 steps/s  0:02 left  val/accuracy 0.9, loss 0.5
    epoch 1/3 |##   | step 4/8  loss 0.5
    epoch 1/3  step 4/8  loss 0.5
    epoch 1/3  loss 0.5
    epoch 1/3
    """
    pad = max((width(part.label) for part in parts if part.share is not None), default=0)
    return [_fit(part, pad if part.share is not None else 0, columns, smooth) for part in parts]


def plain(run: Part | None, beside: Part | None) -> str:
    """Return one line of text without a bar, of any length."""
    parts = [] if run is None else [run.label, *run.facts, ", ".join(run.values)]
    if beside is not None:
        parts = [*parts[:2], f"{beside.label} {', '.join(beside.facts)}"]
    return "  ".join(parts).rstrip()


def page(parts: Iterable[Part]) -> str:
    """Return the lines as HTML."""
    return "".join(map(_html, parts))


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, or with hours.

    >>> clock(7.6), clock(3600)
    ('0:08', '1:00:00')
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def rate(steps: float) -> str:
    """Return a number of steps per second as text.

    >>> rate(12345.6), rate(12.345), rate(0.25)
    ('12,346 steps/s', '12.3 steps/s', '4.00 s/step')
    """
    if steps < 1:
        return f"{1 / steps:#.3g} s/step"
    return f"{steps:#.3g} steps/s" if steps < 99.95 else f"{steps:,.0f} steps/s"


def _fit(part: Part, pad: int, columns: int, smooth: bool) -> str:
    """Return a line that holds as much of a part as fits, the most important first."""
    facts, values = len(part.facts), len(part.values)
    first = [("values", i) for i in part.first]
    rest = [("values", i) for i in range(values) if i not in part.first]
    ends, middle = [("facts", i) for i in range(facts)[:1]], [("facts", i) for i in range(1, facts - 1)]
    last = [("facts", facts - 1)] if facts > 1 else []
    bar = [("bar", 5)] if part.share is not None else []
    wide = [("bar", columns // 10)] if part.share is not None and columns // 10 > 5 else []
    line = _line(part, pad, set(), smooth)
    chosen: set[tuple[str, int]] = set()
    for choice in (*first[:1], *ends, *first[1:], *bar, *last, *rest, *middle, *wide):
        longer = _line(part, pad, chosen | {choice}, smooth)
        if width(longer) < columns:
            line, chosen = longer, chosen | {choice}
    while width(line) >= columns:
        line = line[:-1]
    return line


def _line(part: Part, pad: int, chosen: set[tuple[str, int]], smooth: bool) -> str:
    widths = [size for what, size in chosen if what == "bar"]
    between = f" |{_bar(part.share or 0.0, max(widths), smooth)}| " if widths else "  "
    facts = [fact for i, fact in enumerate(part.facts) if ("facts", i) in chosen]
    values = [value for i, value in enumerate(part.values) if ("values", i) in chosen]
    text = "  ".join([*facts, *filter(None, [", ".join(values)])])
    return f"{part.label}{' ' * (pad - width(part.label))}{between}{text}".rstrip()


def _bar(share: float, width: int, smooth: bool) -> str:
    if not smooth:
        return ("#" * int(share * width)).ljust(width)
    full, eighths = divmod(int(share * width * 8), 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[eighths]).rstrip().ljust(width)


def _html(part: Part) -> str:
    bar = "" if part.share is None else f'<progress value="{part.share:.4f}" max="1"></progress>'
    text = html.escape("  ".join([*part.facts, ", ".join(part.values)]).rstrip())
    return f'<div style="white-space: pre-wrap">{html.escape(part.label)} {bar} {text}</div>'
