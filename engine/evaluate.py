"""Metrics of a state over a set of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from .checks import check_int, takes_rng
from .compiled.origin import function_name, note_origin
from .data.batches import EpochIterator
from .data.source import Data, length, open_pass
from .means import Mean, fetch, merges
from .messages import warn_user
from .metrics import Metrics, as_metrics
from .placement import fold_in, jit_is_disabled, make_placement
from .processes import check_same
from .trees import State, copy_containers, copy_numpy, named_leaves

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
    weight: str | None = None,
    watch: Callable[[int, int | None], None] | None = None,
) -> dict[str, float]:
    """Return the mean of a step's metrics over a set of data.

    Batches are weighted by their number of examples, so a short last one does not bias the mean. That number is the
    size of the leading axis. If leaves disagree about it, the axes that are shorter in a short last batch count. If the
    shapes leave it open, pass `weight`. Clu metrics merge exactly. The step is compiled once for each function and
    shape.

    Args:
        step: `(state, batch) -> metrics`; a third required argument is a random key, `rng` folded with the number
            of the batch.
        state: any pytree.
        data: an iterable of batches, or a callable `epoch -> iterable`, which is called with 0.
        rng: a random key.
        steps: batches to use, for data without an end.
        mesh: the devices to use, as for `Engine`. A batch that does not divide evenly over them is replicated. With a
            NamedSharding, examples are counted along the axis that it divides.
        weight: the name of a metric that is the weight of its batch, such as a number of tokens. It is not returned.
        watch: called after each batch with the number of batches done, and their total or None.

    Raises:
        ValueError: the data is empty, the step takes a random key and `rng` is None, or the number of examples of a
            batch is unknown and `weight` is None.

    >>> import jax.numpy as jnp
    >>> def error(state, batch):
    ...     return {"mae": jnp.abs(batch - state).mean()}
    >>> evaluate(error, 1.0, [jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0])])
    {'mae': 1.75}

    Sequences of different lengths, with a mean over tokens:

    >>> def error(state, batch):
    ...     return {"mae": jnp.abs(batch - state).mean(), "tokens": batch.size}
    >>> evaluate(error, 1.0, [jnp.ones((1, 3)), jnp.full((1, 1), 5.0)], weight="tokens")
    {'mae': 1.0}
    """
    if steps is not None:
        check_int("evaluate", "steps", steps, 1)
    random = takes_rng(step, "The evaluation step")
    if not random:
        rng = None
    elif rng is None:
        raise ValueError("The evaluation step takes a random key as its third argument. Pass one: rng=...")
    if dropped := getattr(data, "dropped", 0):
        warn_user(f"The evaluation data drops {dropped} example{'s' * (dropped > 1)}. Pass drop_last=False.")
    placement = make_placement(mesh)
    if placement.processes > 1:
        check_same({"the number of batches to evaluate on": length(data)})
        placement.begin("evaluation")
    compiled = placement.compile_evaluation(step)
    results: list[Metrics] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    total = min((n for n in (length(data), steps) if n is not None), default=None)
    batches = open_pass(data, 0, placement, ragged=True)
    for number, batch in enumerate(islice(batches, steps)):
        batch = batch if isinstance(batches, EpochIterator) else copy_numpy(batch)
        batch = placement.place_batch(batch, ragged=True)
        key = [] if rng is None else [fold_in(rng, number)]
        # A step that is not compiled, because of jax.disable_jit, could change the caller's containers.
        given = copy_containers((state, batch)) if jit_is_disabled() else (state, batch)
        with placement.context(), note_origin(f"the evaluation step {function_name(step)}", step):
            results.append(_metrics(compiled(*given, *key)))
        shapes.append({name: getattr(leaf, "shape", ()) for name, leaf in named_leaves(batch).items()})
        jax.block_until_ready(results[-IN_FLIGHT - 1 : -IN_FLIGHT])
        if watch is not None:
            watch(number + 1, total)
    if not results:
        raise _no_batches(data)
    fetched = fetch(results)
    if weight is not None:
        weights: Sequence[float] = _given_weights(fetched, len(results), weight)
    elif all(merges(values[0]) for values in fetched.values()):
        weights = [1] * len(results)  # not used: clu metrics count their examples themselves
    else:
        weights = _example_counts(shapes, mesh)
    means = {}
    for name, values in fetched.items():
        mean = Mean()
        mean.add(values, [w for result, w in zip(results, weights, strict=True) if name in result])
        means[name] = mean.value(name)
    return means


def check_evaluation(
    step: Callable[..., Any],
    state: State,
    data: Data,
    *,
    rng: jax.Array | None = None,
    mesh: Mesh | NamedSharding | None = None,
) -> list[str]:
    """Trace an evaluation step for the first batch, so that an error in it is raised before a run, not after an epoch.

    Nothing is computed. The batch is drawn from a separate pass; data that can be read only once is not touched.
    While jit is disabled, nothing is traced.

    Args:
        step, state, data, rng, mesh: as for `evaluate`.

    Returns:
        The names of the metrics; an empty list if nothing was traced.

    Raises:
        ValueError: the data is empty, or a metric is not a scalar.
        TypeError: the data is not a source of batches, or the step does not return metrics.

    >>> import numpy as np
    >>> check_evaluation(lambda state, batch: {"error": batch - state}, 1.0, [np.ones(2)])
    Traceback (most recent call last):
    ...
    ValueError: The evaluation step needs scalar metrics, got shape (2,) for 'error'. Reduce it, e.g. .mean(). ...
    """
    if hasattr(data, "__next__") or jit_is_disabled():  # then the step may read values, which a trace has not
        return []
    placement = make_placement(mesh)
    batches = open_pass(data, 0, placement, ragged=True)
    try:
        batch = next(batches, None)
    finally:
        getattr(batches, "close", lambda: None)()
    if batch is None:
        raise _no_batches(data)
    compiled = placement.compile_evaluation(step)
    key = [rng] if takes_rng(step, "The evaluation step") else []
    with placement.context(), note_origin(f"the evaluation step {function_name(step)}", step):
        metrics = jax.eval_shape(
            lambda *given: _metrics(compiled(*given)),
            state,
            placement.place_batch(batch, ragged=True),
            *key,
        )
    return list(metrics)


def _metrics(results: Any) -> Metrics:
    """Return the metrics that an evaluation step returned."""
    if isinstance(results, tuple) and len(results) in (2, 3):
        raise TypeError(
            f"The evaluation step needs to return only metrics, got {len(results)} results, as of a training step. "
            'Write a function of its own: return {"accuracy": accuracy}.'
        )
    return as_metrics(results, "The evaluation step")


def _no_batches(data: Data) -> ValueError:
    once = f" A {type(data).__name__} can be read only once." if hasattr(data, "__next__") else ""
    return ValueError(f"The evaluation data yielded no batches: {type(data).__name__}.{once}")


def _given_weights(fetched: dict[str, list[Any]], batches: int, weight: str) -> list[float]:
    """Remove the metric that is the weight from the values by name, and return it.

    Raises:
        ValueError: it is missing, not a scalar, negative, not finite, or 0 in all batches.
    """
    weights = fetched.pop(weight, [])
    numbers = len(weights) == batches and not merges(weights[0])
    if not numbers or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"evaluate needs the metric {weight!r} in every batch as its weight, a number >= 0 and not always 0, got "
            f"{weights[:4] or sorted(fetched)}."
        )
    return weights


def _example_counts(shapes: list[dict[str, tuple[int, ...]]], mesh: Mesh | NamedSharding | None) -> list[int]:
    """Return the number of examples of each batch, or 1 for each if all batches have the same shapes.

    Args:
        shapes: of the leaves of each batch, by name.
        mesh: a NamedSharding says which axis counts the examples.

    Raises:
        ValueError: the shapes do not tell.
    """
    if all(batch == shapes[0] for batch in shapes):
        return [1] * len(shapes)
    spec = list(mesh.spec) if isinstance(mesh, NamedSharding) else []
    axis = next((number for number, name in enumerate(spec) if name is not None), None)
    sizes = [{shape[axis or 0] for shape in batch.values() if len(shape) > (axis or 0)} or {1} for batch in shapes]
    if all(len(size) == 1 for size in sizes):
        counts = [next(iter(size)) for size in sizes]
        if axis is None and len(set(counts)) == 1:
            first, other = shapes[0], next(batch for batch in shapes if batch != shapes[0])
            warn_user(
                f"The evaluation batches differ along other axes than the leading one, such as {first} and {other}. "
                "Each gets the same weight. If that is wrong, let the step return the number of examples as a metric, "
                'and pass its name: weight="examples".'
            )
        return counts
    # Leaves disagree, such as the weights of classes beside examples. A short last batch tells which axes count them.
    names = set(shapes[0]).intersection(*shapes)
    varying = {
        tuple(batch[name][number] for batch in shapes)
        for name in names
        if len({len(batch[name]) for batch in shapes}) == 1
        for number in range(len(shapes[0][name]))
    }
    varying = {sizes for sizes in varying if len(set(sizes)) > 1}
    leading = {tuple(batch[name][0] for batch in shapes) for name in names if all(batch[name] for batch in shapes)}
    if len(varying) == 1 and varying <= leading and all(set(batch) == names for batch in shapes):
        (counts,) = varying
        if len(set(counts[:-1])) == 1 and counts[-1] < counts[0]:
            return list(counts)
    raise ValueError(
        f"evaluate cannot tell how many examples a batch has: the shapes are {shapes[0]}, then {shapes[-1]}. Let the "
        'step return the number as a metric, and pass its name: weight="examples".'
    )
