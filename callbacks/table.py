"""Print records as a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TextIO

from onstep import Cadence, Callback, Loop, Record, every, improves, processes
from onstep.tools import check_list, check_mode, print_text, warn_missing_metric

HEADER_EVERY = 30
"""Rows from one header to the next."""


@dataclass(eq=False, repr=False)
class Table(Callback):
    """Prints one row per epoch, with the best values so far marked by `*`.

        epoch   step   epoch/loss   val/accuracy
            1     40       1.2045         0.8121*
            2     80       0.6112*        0.8012

    Use it to follow a run in a terminal. A cell is empty if nothing was recorded since the previous row. The header is
    printed again when a new column appears, and every 30 rows.

    Args:
        columns: the recorded names to show, in order. By default all except `time/...`, and except `train/...` where
            the epoch's mean is shown.
        best: which values to mark, `"min"` or `"max"` by name: `{"val/loss": "min"}`.
        when: when a row is printed, besides the end of the run; a plain int means steps.
        file: where to print; stdout by default.
        name: the callback's name.

    Raises:
        ValueError: `columns` is one string, or a mode is neither "min" nor "max".

    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> table = Table(best={"epoch/loss": "min"})
    >>> _ = Engine(counting_step, [table]).run(0, lambda epoch: [4 - epoch, 6 - epoch], epochs=2)
    epoch     step  epoch/loss
        1        2      5.0000*
        2        4      4.0000*
    """

    columns: Sequence[str] | None = None
    _: KW_ONLY
    best: Mapping[str, str] | None = None
    when: Cadence | int = every(epochs=1)  # noqa: RUF009 (frozen)
    file: TextIO | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_list("Table", "columns", self.columns)
        self._modes = dict(self.best or {})
        for metric, mode in self._modes.items():
            check_mode(f"Table column {metric!r}", mode)
        self.set_state({"values": {}, "best": {}})

    def on_run_begin(self, loop: Loop) -> None:
        self._shown: list[str] = []
        self._rows = 0

    def on_epoch_begin(self, loop: Loop) -> None:
        self._check_names(loop)

    def on_log(self, loop: Loop, record: Record) -> None:
        self._check_names(loop, record)
        for name, value in record.values.items():
            is_best = name in self._modes and improves(value, self._best.get(name), mode=self._modes[name])
            if is_best:
                self._best[name] = value
            self._values[name] = (value, is_best)

    def on_epoch_end(self, loop: Loop) -> None:
        if not loop.over:  # otherwise on_run_end follows
            self._check_names(loop)

    def on_run_end(self, loop: Loop) -> None:
        self._check_names(loop)

    def on_save(self, loop: Loop) -> None:  # by now, everything due at this step has been recorded
        if self._values and processes.writes():
            names = [*self._shown, *(name for name in self._chosen() if name not in self._shown)]
            if names != self._shown or self._rows % HEADER_EVERY == 0:
                self._shown = names
                self._print(["epoch", "step", *(f"{name} " for name in names)])
            self._print([str(loop.epoch), str(loop.step), *map(self._cell, names)])
            self._rows += 1
        self._values = {}

    def get_state(self) -> dict[str, Any]:
        return {"values": self._values, "best": self._best}

    def set_state(self, state: dict[str, Any]) -> None:
        self._values: dict[str, tuple[float, bool]] = dict(state["values"])
        self._best: dict[str, float] = dict(state["best"])

    def _check_names(self, loop: Loop, record: Record | None = None) -> None:
        for name in dict.fromkeys([*(self.columns or ()), *self._modes]):
            warn_missing_metric("Table", name, loop, record)

    def _chosen(self) -> Sequence[str]:
        if self.columns is not None:
            return self.columns
        means = {f"train/{name.removeprefix('epoch/')}" for name in self._values if name.startswith("epoch/")}
        return [name for name in self._values if not name.startswith("time/") and name not in means]

    def _cell(self, name: str) -> str:
        if name not in self._values:
            return ""
        value, best = self._values[name]
        return f"{value:#.5g}".rstrip(".") + ("*" if best else " ")

    def _print(self, cells: list[str]) -> None:
        widths = [5, 7, *(max(len(name) + 1, 11) for name in self._shown)]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print_text(row.rstrip(), self.file or sys.stdout)
