"""Histograms of parameters and gradients in TensorBoard."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Context, Loop, every
from onstep.tools import close_event_writer, difference, event_writer, get_fields, leaves_of_type, local_path, to_host

BINS = 64


class Histogram(NamedTuple):
    """The histogram of one leaf, packed into one row of float32.

    Five arrays would be simpler, but each leaf of a carry costs about 0.9 µs per call.
    """

    counts: Any  # (BINS,), in bins of equal width from `low` to `high`
    low: Any  # scalar, the smallest finite value; inf if there is none
    high: Any  # scalar, the largest finite value; -inf if there is none
    total: Any  # scalar, the sum of the finite values
    squares: Any  # scalar, the sum of their squares

    def pack(self) -> jax.Array:
        """Return the parts as one array of shape (BINS + 4,)."""
        return jnp.concatenate([self.counts.astype(jnp.float32), jnp.stack(self[1:])])

    @classmethod
    def unpack(cls, row: Any) -> Histogram:
        """Return the parts of an array, or of a list, that `pack` made."""
        return cls(row[:BINS], *row[BINS:])


class Histograms(Callback):
    """Writes a histogram of every leaf of the parameters, and optionally of the gradients, to TensorBoard.

    Use it to see weights that grow, vanish or do not move. The values are counted on the device, in 64 bins from
    minimum to maximum, so no weights are transferred; gradients are counted inside the compiled step.
    Non-finite values, and leaves that are not real floats, are left out. tensorboardX writes the
    files; the directory may be that of `TensorBoard`.

    Args:
        directory: the directory for `tensorboard --logdir`.
        of: the field of the state that holds the parameters, `"gen.params"` or `"0.params"` for a nested one; an
            index; a tuple of fields; or None for the whole state.
        grads: True also writes histograms of `aux["grads"]`, which must have the structure of the parameters;
            the step then takes up to 0.1 s longer to compile for each leaf.
        when: when histograms are written; a plain int means steps.
        name: the callback's name.

    Raises:
        ValueError: `directory` is a URL, the state has no such field (when the run begins), or the step returns no
            such gradients (at the first step).

    >>> import os, tempfile
    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return {"params": state["params"] + batch}, {}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     result = Engine(step, [Histograms(directory)]).run({"params": jnp.zeros(9)}, [1.0, 2.0], epochs=1)
    ...     len(os.listdir(directory))
    1
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        of: str | int | tuple[str | int, ...] | None = "params",
        grads: bool = False,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        name: str | None = None,
    ):
        self.directory: str = os.fspath(directory)
        self._path = local_path("Histograms", directory)
        self.of: str | int | tuple[str | int, ...] | None = of
        self.grads: bool = grads
        self.when: Cadence | int = when
        self.name: str | None = name
        if grads:
            self.update_when: Cadence | int = when

    def init(self, state: Any) -> Any:
        rows = len(_floats("grads", self._params(state)))
        return jnp.zeros((rows, BINS + 4), jnp.float32) if self.grads else ()

    def update(self, carry: Any, ctx: Context) -> tuple[Any, Context]:
        if not self.grads:
            return carry, ctx
        params, grads = self._params(ctx.state), ctx.aux.get("grads")
        if jax.tree.structure(params) != jax.tree.structure(grads):
            raise ValueError(
                f"Histograms(grads=True) needs aux['grads'] to have the structure of {self.of!r}, but from {self.of!r} "
                f"to aux['grads'], {difference(params, grads)}. "
                'Return it from the step: state, metrics, {"grads": grads}.'
            )
        return jnp.array([_row(leaf) for leaf in _floats("grads", grads).values()]).reshape(carry.shape), ctx

    def on_step_end(self, loop: Loop) -> None:
        params = self._params(loop.state)
        parts = zip(self.of, params, strict=True) if isinstance(self.of, tuple) else [(self.of, params)]
        named = {"state" if of is None else str(of): part for of, part in parts}
        rows = {name: _row(leaf) for name, leaf in leaves_of_type(named, jnp.floating).items()}
        if self.grads:
            rows |= zip(_floats("grads", params), loop.carry(self), strict=True)
        for name, row in rows.items():
            counts, low, high, total, squares = Histogram.unpack(to_host(row).astype(float).tolist())
            if low == high:  # the range that numpy.histogram uses for equal values
                low, high = low - 0.5, high + 0.5
            if n := sum(counts):
                limits = np.linspace(low, high, BINS + 1)[1:].tolist()
                writer = event_writer(loop, self._path)
                writer.add_histogram_raw(name, low, high, n, total, squares, limits, counts, loop.step)

    def on_run_end(self, loop: Loop) -> None:
        close_event_writer(loop, self._path)

    def _params(self, state: Any) -> Any:
        return get_fields(state, self.of, "Histograms")


def _floats(name: str, tree: Any) -> dict[str, jax.Array]:
    """Return the leaves that are real floats, as `<name>/<path>`."""
    return leaves_of_type({name: tree}, jnp.floating)


@jax.jit
def _row(leaf: jax.Array) -> jax.Array:
    """Return the packed `Histogram` of a leaf: float32[BINS + 4]."""
    x = leaf.astype(jnp.float32).ravel()
    finite = jnp.isfinite(x)
    low, high = x.min(initial=jnp.inf, where=finite), x.max(initial=-jnp.inf, where=finite)
    place = ((x - low) / (high - low) * BINS).astype(jnp.int32).clip(0, BINS - 1)
    counts = jnp.bincount(jnp.where(finite, place, BINS), length=BINS)
    return Histogram(counts, low, high, x.sum(where=finite), (x * x).sum(where=finite)).pack()
