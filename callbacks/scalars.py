"""Record scalars from the state."""

from __future__ import annotations

import jax
from onstep import Callback, Loop, Record
from onstep.tools import did_you_mean, has_training_metrics, signature


class Scalars(Callback):
    """Records scalars from the state with every window of training metrics.

    Use it for a loss scale, a counter of accumulated gradients or a learned temperature:
    `Scalars("loss_scale", "opt_state.mini_step")`. Each one is recorded under the name that you give. It is the
    value at the window's last step, not a mean.

    Args:
        names: leaves of the state, each given by a path suffix that matches one leaf.
        name: the callback's name.

    Raises:
        ValueError: there are no names; or, when the run begins, no leaf or several leaves have that name, or the leaf
            is not a number.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {"amp": {"scale": 2 * state["amp"]["scale"]}}, {"loss": batch}
    >>> engine = Engine(step, [Scalars("scale")], log_every=2)
    >>> engine.run({"amp": {"scale": jnp.float32(1)}}, [1.0] * 4, epochs=1).history["scale"]
    [4.0, 16.0]
    """

    def __init__(self, *names: str, name: str | None = None):
        if not names:
            raise ValueError('Scalars needs the names of leaves, such as Scalars("scale"), got none.')
        self.names: tuple[str, ...] = names
        self.name: str | None = name

    def on_run_begin(self, loop: Loop) -> None:
        kinds = signature(loop.state)
        paths = [path.removesuffix("/value") for path in kinds]  # NNX adds this part to every path
        self._leaves: dict[str, int] = {}
        for name in self.names:
            path = name.replace(".", "/")
            found = [i for i, known in enumerate(paths) if f"/{known}".endswith(f"/{path}")]
            if not found:
                raise ValueError(f"Scalars found no leaf named {name!r} in the state.{did_you_mean(path, paths)}")
            if len(found) > 1:
                several = [paths[i] for i in found]
                raise ValueError(f"Scalars needs one leaf named {name!r}, got {several}. Give more of the path.")
            kind = [*kinds.values()][found[0]]
            if kind.startswith("key") or not kind.endswith("[]"):
                raise ValueError(f"Scalars needs a number at {name!r}, got {kind}.")
            self._leaves[name] = found[0]

    def on_log(self, loop: Loop, record: Record) -> None:
        if has_training_metrics(record):
            leaves = jax.tree.leaves(loop.state)
            loop.log({name: leaves[i] for name, i in self._leaves.items()})
