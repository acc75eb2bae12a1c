"""Metrics of a state over a set of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from .checks import check_int, takes_rng
from .data.batches import EpochIterator
from .data.source import Data, length, open_pass
from .means import Mean, fetch
from .metrics import Metrics, as_metrics
from .placement import fold_in, make_placement
from .processes import check_same
from .trees import Batch, State, copy_containers, copy_numpy

IN_FLIGHT = 2
"""Batches whose computation may be unfinished, as in training."""


def evaluate(
    step: Callable[..., Any],
    state: State,
    data: Data,
    *,
    rng: jax.Array | None = None,
    steps: int | None = None,
    mesh: Mesh | NamedSharding | Any = None,
    watch: Callable[[int, int | None], None] | None = None,
) -> dict[str, float]:
    """Return the mean of a step's metrics over a set of data.

    Batches are weighted by their number of examples, so a short last one does not bias the mean. Clu metrics merge
    exactly. The step is compiled once for each function and shape.

    Args:
        step: `(state, batch) -> metrics`; a third required argument is a random key, `rng` folded with the number
            of the batch.
        state: any pytree.
        data: an iterable of batches, or a callable `epoch -> iterable`, which is called with 0.
        rng: a random key.
        steps: batches to use, for data without an end.
        mesh: the devices to use, as for `Engine`. A batch that does not divide evenly over them is replicated.
        watch: called after each batch with the number of batches done, and their total or None.

    Raises:
        ValueError: the data is empty, or the step takes a random key and `rng` is None.

    >>> import jax.numpy as jnp
    >>> def error(state, batch):
    ...     return {"mae": jnp.abs(batch - state).mean()}
    >>> evaluate(error, 1.0, [jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0])])
    {'mae': 1.75}
    """
    if steps is not None:
        check_int("evaluate", "steps", steps, 1)
    random = takes_rng(step, "The evaluation step")
    if not random:
        rng = None
    elif rng is None:
        raise ValueError("The evaluation step takes a random key as its third argument. Pass one: rng=...")
    if dropped := getattr(data, "dropped", 0):
        warnings.warn(
            f"The evaluation data drops {dropped} example{'s' * (dropped > 1)}. Pass drop_last=False.", stacklevel=2
        )
    placement = make_placement(mesh)
    if placement.processes > 1:
        check_same({"the number of batches to evaluate on": length(data)})
        placement.begin("evaluation")
    compiled = placement.compile_evaluation(step)
    results: list[Metrics] = []
    weights: list[int] = []
    total = min((n for n in (length(data), steps) if n is not None), default=None)
    batches = open_pass(data, 0, placement, ragged=True)
    for number, batch in enumerate(islice(batches, steps)):
        batch = batch if isinstance(batches, EpochIterator) else copy_numpy(batch)
        batch = placement.place_batch(batch, ragged=True)
        key = [] if rng is None else [fold_in(rng, number)]
        # A step that is not compiled, because of jax.disable_jit, could change the caller's containers.
        given = copy_containers((state, batch)) if jax.config.jax_disable_jit else (state, batch)
        results.append(as_metrics(compiled(*given, *key), "The evaluation step"))
        weights.append(_examples(batch))
        jax.block_until_ready(results[-IN_FLIGHT - 1 : -IN_FLIGHT])
        if watch is not None:
            watch(number + 1, total)
    if not sum(weights):
        once = f" A {type(data).__name__} can be read only once." if hasattr(data, "__next__") else ""
        raise ValueError(f"The evaluation data yielded no batches: {type(data).__name__}.{once}")
    means = {}
    for name, values in fetch(results).items():
        mean = Mean()
        mean.add(values, [w for result, w in zip(results, weights, strict=True) if name in result])
        means[name] = mean.value(name)
    return means


def _examples(batch: Batch) -> int:
    return next((len(leaf) for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)), 1)
