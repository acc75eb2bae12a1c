"""Clip weights after the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from onstep import Cadence, Callback, Context
from onstep.trees import get_field, set_field


class ClipWeights(Callback):
    """Clips weights to [low, high] after the step, as the critic of a Wasserstein GAN needs.

    Compiled into the step (Arjovsky et al., 2017, arXiv:1701.07875: -0.01, 0.01). Leaves that are
    no real floats stay as they are, and so does a NaN. Gradients are Optax's business.

    Args:
        low, high: the bounds, low < high; `-math.inf` or `math.inf` for one side alone.
        of: the field of the state to clip, `"critic.params"` for a nested one.
        when: when weights are clipped; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `low < high` does not hold, or the state has no such field (at the first step).
    """

    def __init__(
        self, low: float, high: float, *, of: str = "params", when: Cadence | int = 1, name: str | None = None
    ):
        if not low < high:
            raise ValueError(f"ClipWeights needs low < high, got {low} and {high}.")
        self.low: float = low
        self.high: float = high
        self.of: str = of
        self.update_when: Cadence | int = when
        self.name: str | None = name

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        def clip(leaf: jax.Array) -> jax.Array:
            return leaf.clip(self.low, self.high) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        clipped = jax.tree.map(clip, get_field(ctx.state, self.of, "ClipWeights"))
        return carry, ctx.replace(state=set_field(ctx.state, self.of, clipped))
