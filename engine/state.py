"""TrainState for Flax Linen users: the state of one model and one optimizer."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from flax.training import train_state


class TrainState(train_state.TrainState, kw_only=True):  # so a subclass may add required fields
    """Flax's TrainState with what most steps want beside the parameters.

    A collection of variables is a field of its name, so `create` takes what `model.init` gave and
    `apply_gradients` what a mutable `apply` gave. Other collections, and anything else, by a plain
    subclass: `class State(TrainState): cache: Any`.

    Attributes:
        step: updates so far, an int32 array from the start, so that a jitted step compiles once.
        batch_stats: the collection of that name; `{}` for a model without one.
        rng: a random key for `step_rng`, or None. A step with a third argument needs none: the
            engine gives it a key.
        metrics: running sums, such as a `clu.metrics.Collection`, or None.

    >>> import flax.linen as nn, optax
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    >>> _, updates = state.apply_fn(variables, jnp.ones((2, 3)), mutable=["batch_stats"])
    >>> state = state.apply_gradients(grads=state.params, **updates)
    >>> int(state.step), state.batch_stats["mean"].round(3).tolist()
    (1, [0.01..., 0.01..., 0.01...])
    """

    batch_stats: Any = struct.field(default_factory=dict)
    rng: jax.Array | None = None
    metrics: Any = None

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> Self:
        """A state before its first update; `kwargs` are the other fields."""
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs).replace(step=jnp.int32(0))

    def step_rng(self) -> jax.Array:
        """The key of the present step, for dropout say: `rng` folded with `step`.

        Raises:
            ValueError: the state has no `rng`.
        """
        if self.rng is None:
            raise ValueError("TrainState.step_rng needs a random key. Give create one: rng=jax.random.key(0).")
        return jax.random.fold_in(self.rng, self.step)
