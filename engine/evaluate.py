"""Metrics of a state over a set of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice

import jax
from jax.sharding import Mesh, NamedSharding

from . import checks, processes
from .batches import Pass
from .compiled import Step
from .means import Tally, fetch
from .metrics import Metrics, as_metrics
from .sharding import Spread
from .source import Data, length, open_pass
from .trees import Batch, State, copied

QUEUE = 2
"""Batches whose computation may be queued, as in training."""


def evaluate(
    step: Step,
    state: State,
    data: Data,
    *,
    rng: jax.Array | None = None,
    steps: int | None = None,
    mesh: Mesh | NamedSharding | None = None,
    watch: Callable[[int, int | None], None] | None = None,
) -> dict[str, float]:
    """The mean of a step's metrics over a set of data.

    Each batch counts by its leading axis, so a short last one does not bias the mean; clu
    metrics merge exactly. Compiled once for each function and shape.

    Args:
        step: `(state, batch) -> metrics`; a third required argument is a random key, `rng` folded
            with the batch's number.
        state: any pytree.
        data: an iterable of batches; a callable is called with 0.
        rng: a random key.
        steps: batches to use, for data without an end.
        mesh: of many devices, as an engine takes it: batches are cut along it. One that does not divide
            is whole on every device.
        watch: called after each batch with how many are done, and of how many, None if not known.

    Raises:
        ValueError: there is no batch, or no key for a step that takes one.
    """
    if steps is not None:
        checks.whole("evaluate", "steps", steps, 1)
    random = checks.takes_rng(step, "The evaluation step")
    if not random:
        rng = None
    elif rng is None:
        raise ValueError("The evaluation step takes a random key as its third argument. Pass one: rng=...")
    if left_out := getattr(data, "dropped", 0):
        warnings.warn(f"The data leaves out {left_out} examples of an evaluation. Pass drop_last=False.", stacklevel=2)
    spread = None if mesh is None else Spread(mesh)
    if spread is not None and spread.processes > 1:
        processes.same({"the number of batches to evaluate on": length(data)})
    # jax keeps one cache for a function, however often it is wrapped
    compiled = jax.jit(step) if spread is None else jax.jit(step, out_shardings=spread.whole)
    results: list[Metrics] = []
    weights: list[int] = []
    total = min((n for n in (length(data), steps) if n is not None), default=None)
    batches = open_pass(data, 0, spread, ragged=True)
    for number, batch in enumerate(islice(batches, steps)):
        batch = batch if isinstance(batches, Pass) else copied(batch)
        batch = batch if spread is None else spread.put(batch, ragged=True)
        key = [] if rng is None else [jax.random.fold_in(rng, number)]
        results.append(as_metrics(compiled(state, batch, *key), "The evaluation step"))
        weights.append(_examples(batch))
        jax.block_until_ready(results[-QUEUE - 1 : -QUEUE])
        if watch is not None:
            watch(number + 1, total)
    if not sum(weights):
        once = f" A {type(data).__name__} can be read only once." if hasattr(data, "__next__") else ""
        raise ValueError(f"The data to evaluate on yielded no batches: {type(data).__name__}.{once}")
    means = {}
    for name, values in fetch(results).items():
        tally = Tally()
        tally.add(values, [w for result, w in zip(results, weights, strict=True) if name in result])
        means[name] = tally.mean(name)
    return means


def _examples(batch: Batch) -> int:
    return next((len(leaf) for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)), 1)
