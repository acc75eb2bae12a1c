"""What a state holds, as a table."""

from __future__ import annotations

import sys
from dataclasses import make_dataclass
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from onstep import Callback, Loop, processes
from onstep.trees import get_field, leaves


class Summary(Callback):
    """Prints the parameters when a run begins, and what the fields of the state take in all.

    Two tables, drawn by `clu.parameter_overview`; what callbacks keep on the device is counted
    as `carries`.

    Args:
        of: the field of the state whose leaves are listed, `"gen.params"` for a nested one, None
            for the whole state.
        stats: True adds mean and standard deviation of the leaves that are real floats.
        file: where to; stderr without.
        name: the callback's name.

    Raises:
        ValueError: the state has no such field (at the start).
    """

    def __init__(
        self, of: str | None = "params", *, stats: bool = False, file: TextIO | None = None, name: str | None = None
    ):
        self.of: str | None = of
        self.stats: bool = stats
        self.name: str | None = name
        self._file = file

    def on_run_begin(self, loop: Loop) -> None:
        listed = leaves(loop.state if self.of is None else get_field(loop.state, self.of, "Summary"))
        fields: dict[str, list[Any]] = {}
        for name, leaf in leaves(loop.state).items():
            fields.setdefault(name.split("/")[0], []).append(leaf)
        fields.setdefault("carries", []).extend(jax.tree.leaves(loop.carries))
        fields["total"] = [leaf for field in fields.values() for leaf in field]
        tables = (
            [{"name": name, "shape": leaf.shape, **self._row(leaf)} for name, leaf in listed.items()],
            [{"field": name, **_size(field)} for name, field in fields.items()],
        )
        if processes.writes():
            print(*map(_table, tables), sep="\n", file=self._file or sys.stderr, flush=True)

    def _row(self, leaf: jax.Array) -> dict[str, Any]:
        row = {"dtype": str(leaf.dtype), **_size([leaf])}
        if not self.stats:
            return row
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return row | {"mean": "", "std": ""}
        wide = leaf.astype(jnp.float32)
        return row | {"mean": float(wide.mean()), "std": float(wide.std())}


def _size(arrays: list[Any]) -> dict[str, int]:
    return {"size": sum(int(x.size) for x in arrays), "bytes": sum(int(x.nbytes) for x in arrays)}


def _table(rows: list[dict[str, Any]]) -> str:
    from clu.parameter_overview import make_table

    row = make_dataclass("Row", rows[0] if rows else ())
    return make_table([row(**values) for values in rows])
