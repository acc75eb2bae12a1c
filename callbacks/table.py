"""Print records as a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from onstep import Cadence, Callback, Loop, Record, every, improves, processes

HEADER_EVERY = 30
"""Rows between two headers."""


class Table(Callback):
    """Prints a row per epoch, the best values so far marked with `*`.

        epoch   step   epoch/loss   val/accuracy
            1     40       1.2045         0.8121*
            2     80       0.6112*        0.8012

    A cell is empty where nothing was recorded since the row before. The header comes again where a
    column is new, and every 30 rows.

    Args:
        columns: the recorded names to show, in order; without, all but `time/...`, and `train/...`
            where there is an epoch's mean.
        best: `"min"` or `"max"` by name: `{"val/loss": "min"}`.
        when: when a row is due, and at the run's end; a plain int means steps.
        file: where to; stdout without.
        name: the callback's name.

    Raises:
        ValueError: a mode is neither "min" nor "max".
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        *,
        best: Mapping[str, str] | None = None,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        file: TextIO | None = None,
        name: str | None = None,
    ):
        self.columns: Sequence[str] | None = columns
        self.best: dict[str, str] = dict(best or {})
        self.when: Cadence | int = when
        self.name: str | None = name
        self._file = file
        for metric, mode in self.best.items():
            if mode not in ("min", "max"):
                raise ValueError(f"Table needs mode 'min' or 'max' for {metric!r}, got {mode!r}.")
        self.set_state({"values": {}, "best": {}})

    def on_run_begin(self, loop: Loop) -> None:
        self._shown: list[str] = []
        self._rows = 0

    def on_log(self, loop: Loop, record: Record) -> None:
        for name, value in record.values.items():
            found = name in self.best and improves(value, self._best.get(name), mode=self.best[name])
            if found:
                self._best[name] = value
            self._values[name] = (value, found)

    def on_save(self, loop: Loop) -> None:  # all that is due at this step has been recorded
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
        print(row.rstrip(), file=self._file or sys.stdout, flush=True)
