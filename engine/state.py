"""TrainState: the state of one Flax Linen model and one optimizer."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from flax.training import train_state


class TrainState(train_state.TrainState, kw_only=True):  # so a subclass may add required fields
    """Flax's TrainState with fields for batch statistics, a random key and running metrics.

    A collection of variables is a field with the name of the collection. So `create` accepts what `model.init` returns,
    and `apply_gradients` accepts the updates that a mutable `apply` returns. For other fields, write a subclass:
    `class State(TrainState): cache: Any`.

    Attributes:
        step: the number of updates, an int32 array from the beginning, so that a jitted step compiles once.
        batch_stats: the collection `batch_stats`; `{}` for a model without it.
        rng: a random key for `step_rng`, or None. A step with a third argument needs none, because the engine
            passes a key to it.
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
        """Return a state before its first update; `kwargs` are the other fields."""
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs).replace(step=jnp.int32(0))

    def step_rng(self) -> jax.Array:
        """Return the random key of the current step, for example for dropout: `rng` folded with `step`.

        Raises:
            ValueError: the state has no `rng`.

        >>> import optax
        >>> state = TrainState.create(apply_fn=None, params={}, tx=optax.sgd(0.1), rng=jax.random.key(0))
        >>> bool(state.step_rng() == jax.random.fold_in(jax.random.key(0), 0))
        True
        """
        if self.rng is None:
            raise ValueError(
                "TrainState.step_rng needs a random key. Pass one: TrainState.create(..., rng=jax.random.key(0))."
            )
        return jax.random.fold_in(self.rng, self.step)
