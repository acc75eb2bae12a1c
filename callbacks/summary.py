"""Print a table of the parameters and of the size of the state."""

from __future__ import annotations

import sys
from dataclasses import KW_ONLY, dataclass, make_dataclass
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from onstep import Callback, Loop, processes
from onstep.tools import get_fields, named_leaves, print_text, to_host


@dataclass(eq=False, repr=False)
class Summary(Callback):
    """Prints the parameters and the memory that the state takes when a run begins.

    There are two tables, drawn by `clu.parameter_overview`. The first lists every parameter. The second lists size
    and bytes of each field of the state, and of `carries`, the arrays that callbacks keep on the device.

    Args:
        of: the field of the state whose leaves are listed: `"gen.params"` or `"0.params"` for a nested one; an
            index; a tuple of fields; or None for the whole state.
        stats: True adds mean and standard deviation of the leaves that are real floats.
        file: where to print; stderr by default.
        name: the callback's name.

    Raises:
        ValueError: the state has no such field (raised when the run begins).

    >>> from onstep import Engine
    >>> state = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "count": 0}
    >>> _ = Engine(lambda state, batch: (state, {}), [Summary(file=sys.stdout)]).run(state, [0], epochs=1)
    +--------+--------+---------+------+-------+
    | Name   | Shape  | Dtype   | Size | Bytes |
    +--------+--------+---------+------+-------+
    | bias   | (2,)   | float32 | 2    | 8     |
    | kernel | (3, 2) | float32 | 6    | 24    |
    +--------+--------+---------+------+-------+
    +---------+------+-------+
    | Field   | Size | Bytes |
    +---------+------+-------+
    | count   | 1    | 4     |
    | params  | 8    | 32    |
    | carries | 0    | 0     |
    | total   | 9    | 36    |
    +---------+------+-------+
    """

    of: str | int | tuple[str | int, ...] | None = "params"
    _: KW_ONLY
    stats: bool = False
    file: TextIO | None = None
    name: str | None = None

    def on_run_begin(self, loop: Loop) -> None:
        listed = named_leaves(get_fields(loop.state, self.of, "Summary"))
        fields: dict[str, list[Any]] = {}
        for name, leaf in named_leaves(loop.state).items():
            fields.setdefault(name.split("/")[0], []).append(leaf)
        fields.setdefault("carries", []).extend(jax.tree.leaves(loop.carries))
        fields["total"] = [leaf for field in fields.values() for leaf in field]
        tables = (
            [{"name": name, "shape": leaf.shape, **self._row(leaf)} for name, leaf in listed.items()],
            [{"field": name, **_size(field)} for name, field in fields.items()],
        )
        if processes.writes():
            print_text("\n".join(map(_table, tables)), self.file or sys.stderr)

    def _row(self, leaf: jax.Array) -> dict[str, Any]:
        row = {"dtype": str(leaf.dtype), **_size([leaf])}
        if not self.stats:
            return row
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return row | {"mean": "", "std": ""}
        mean, std = to_host(_mean_and_std(leaf)).tolist()
        return row | {"mean": mean, "std": std}


@jax.jit  # eager operations would transfer their constants implicitly
def _mean_and_std(leaf: jax.Array) -> jax.Array:
    wide = leaf.astype(jnp.float32)
    return jnp.stack([wide.mean(), wide.std()])


def _size(arrays: list[Any]) -> dict[str, int]:
    return {"size": sum(int(x.size) for x in arrays), "bytes": sum(int(x.nbytes) for x in arrays)}


def _table(rows: list[dict[str, Any]]) -> str:
    from clu.parameter_overview import make_table

    row = make_dataclass("Row", rows[0] if rows else ())
    return make_table([row(**values) for values in rows])
