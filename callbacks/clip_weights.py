"""Clip weights after each step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.tools import get_fields, set_fields


@dataclass(eq=False, repr=False)
class ClipWeights(Callback):
    """Clips weights to [low, high] after the step, as required for a Wasserstein GAN's critic.

    It runs inside the compiled step (Arjovsky et al., 2017, arXiv:1701.07875, clip to [-0.01, 0.01]). Leaves
    that are not real floats stay unchanged, and NaN stays NaN. To clip gradients, use Optax.

    Args:
        low: the lower bound, less than `high`; `-math.inf` for none.
        high: the upper bound; `math.inf` for none.
        of: the field of the state to clip, `"critic.params"` or `"0.params"` for a nested one; an index; a tuple
            of fields; or None for the whole state.
        when: when weights are clipped; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `low < high` does not hold, or the state has no such field (when the run begins).

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {"params": state["params"] + batch}, {}
    >>> result = Engine(step, [ClipWeights(-1, 1)]).run({"params": jnp.zeros(2)}, [3.0], epochs=1)
    >>> result.state["params"].tolist()
    [1.0, 1.0]
    """

    low: float
    high: float
    _: KW_ONLY
    of: str | int | tuple[str | int, ...] | None = "params"
    when: Cadence | int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"ClipWeights needs low < high, got {self.low} and {self.high}.")
        self.update_when: Cadence | int = self.when

    def init(self, state: Any) -> tuple[()]:
        get_fields(state, self.of, "ClipWeights")  # for its error
        return ()

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        def clip(leaf: jax.Array) -> jax.Array:
            return leaf.clip(self.low, self.high) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        clipped = jax.tree.map(clip, get_fields(ctx.state, self.of, "ClipWeights"))
        return carry, ctx.replace(state=set_fields(ctx.state, self.of, clipped))
