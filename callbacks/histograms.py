"""Histograms of parameters and gradients in TensorBoard."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Context, Loop, event_files, every
from onstep.sharding import to_host
from onstep.trees import difference, get_field, leaves

BINS = 64


class Histograms(Callback):
    """Writes a histogram of every leaf of the parameters to TensorBoard, and of the gradients if asked.

    Counted on the device, in 64 bins from the least value to the greatest, so no weight is
    transferred; for gradients inside the step. Values that are not finite are left out, and so
    are leaves that are no real floats. Written by tensorboardX; the directory may be TensorBoard's.

    Args:
        directory: where `tensorboard --logdir` shall look.
        of: the field of the state that holds the parameters, `"gen.params"` for a nested one.
        grads: True also writes those of `aux["grads"]`, which are like the parameters; the step
            takes up to 0.1 s a leaf longer to compile.
        when: when histograms are written; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: the state has no such field (at the start), or the step returns no such
            gradients (at the first step).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        of: str = "params",
        grads: bool = False,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        name: str | None = None,
    ):
        self.directory: str = os.fspath(directory)
        self.of: str = of
        self.grads: bool = grads
        self.when: Cadence | int = when
        self.name: str | None = name
        if grads:
            self.update_when = when

    def init(self, state: Any) -> Any:
        rows = len(_floats("grads", self._params(state)))
        return jnp.zeros((rows, BINS + 4)) if self.grads else ()

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        if not self.grads:
            return carry, ctx
        params, grads = self._params(ctx.state), ctx.aux.get("grads")
        if jax.tree.structure(params) != jax.tree.structure(grads):
            raise ValueError(
                f"Histograms(grads=True) needs aux['grads'] like {self.of!r}, got one in which "
                f'{difference(params, grads)}. Return it from the step: state, metrics, {{"grads": grads}}.'
            )
        return jnp.array([_row(leaf) for leaf in _floats("grads", grads).values()]).reshape(carry.shape), ctx

    def on_step_end(self, loop: Loop) -> None:
        params = self._params(loop.state)
        rows = {name: _row(leaf) for name, leaf in _floats(self.of, params).items()}
        if self.grads:
            rows |= zip(_floats("grads", params), loop.carry(self), strict=True)
        for name, row in rows.items():
            *counts, low, high, total, squares = to_host(row).astype(float).tolist()
            if low == high:  # as numpy does
                low, high = low - 0.5, high + 0.5
            if n := sum(counts):
                limits = np.linspace(low, high, BINS + 1)[1:].tolist()
                writer = event_files.writer(loop, self.directory)
                writer.add_histogram_raw(name, low, high, n, total, squares, limits, counts, loop.step)

    def on_run_end(self, loop: Loop) -> None:
        event_files.close(loop, self.directory)

    def _params(self, state: Any) -> Any:
        return get_field(state, self.of, "Histograms")


def _floats(name: str, tree: Any) -> dict[str, jax.Array]:
    """The leaves that are real floats, by `<name>/<path>`."""
    return {path: leaf for path, leaf in leaves({name: tree}).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


@jax.jit
def _row(leaf: jax.Array) -> jax.Array:
    """The counts, the least value and the greatest, the sum and that of the squares."""
    x = leaf.astype(jnp.float32).ravel()
    finite = jnp.isfinite(x)
    low, high = x.min(initial=jnp.inf, where=finite), x.max(initial=-jnp.inf, where=finite)
    place = ((x - low) / (high - low) * BINS).astype(jnp.int32).clip(0, BINS - 1)
    counts = jnp.bincount(jnp.where(finite, place, BINS), length=BINS)
    return jnp.concatenate([counts, jnp.stack([low, high, x.sum(where=finite), (x * x).sum(where=finite)])])
