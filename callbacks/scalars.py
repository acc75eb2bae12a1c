"""Record numbers that the state holds."""

from __future__ import annotations

import jax
from onstep import Callback, Loop, Record
from onstep.checks import nearest
from onstep.trees import signature


class Scalars(Callback):
    """Records numbers of the state whenever a window of training metrics is recorded.

    Such as a loss scale, a counter of accumulated gradients, a temperature that is learnt:
    `Scalars("loss_scale", "opt_state.mini_step")`. Each is recorded under the name given, with
    its value at that step, no mean.

    Args:
        names: leaves of the state; as much of the end of a path as makes it the only one.
        name: the callback's name.

    Raises:
        ValueError: no leaf or several have that name, or it is no number (at the start).
    """

    def __init__(self, *names: str, name: str | None = None):
        self.names: tuple[str, ...] = names
        self.name: str | None = name

    def on_run_begin(self, loop: Loop) -> None:
        kinds = signature(loop.state)
        paths = [path.removesuffix("/value") for path in kinds]  # NNX has one more part behind each name
        self._leaves: dict[str, int] = {}
        for name in self.names:
            path = name.replace(".", "/")
            found = [i for i, known in enumerate(paths) if f"/{known}".endswith(f"/{path}")]
            if not found:
                raise ValueError(f"Scalars finds nothing named {name!r} in the state.{nearest(path, paths)}")
            if len(found) > 1:
                several = [paths[i] for i in found]
                raise ValueError(f"Scalars needs one leaf named {name!r}, got {several}. Give more of the path.")
            kind = [*kinds.values()][found[0]]
            if kind.startswith("key") or not kind.endswith("[]"):
                raise ValueError(f"Scalars needs a number at {name!r}, got {kind}.")
            self._leaves[name] = found[0]

    def on_log(self, loop: Loop, record: Record) -> None:
        if any(name.startswith("train/") for name in record.values):
            leaves = jax.tree.leaves(loop.state)
            loop.log({name: leaves[i] for name, i in self._leaves.items()})
