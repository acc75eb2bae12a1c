"""Blocks: several steps in one compiled call, and how many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..trees import Batch
from .cost import equations, product_flops

MOST = 128
"""The most steps in a block. More gain nothing, whatever the step costs."""
FLOPS = 4e9
"""Floating-point operations of a block, about 0.1 s on two cores: short enough to wait for."""
BYTES = 2**25
"""Bytes of the batches of a block."""
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "small-while-loop-hoisting"}
"""XLA's CPU compiler compiles a loop that touches less than about a kilobyte as one piece of machine code, in which
optimization barriers have no effect. Without this pass it does not. Other backends do not have the pass."""


def choose_block_size(jaxpr: Any, batch: Batch) -> tuple[int, str]:
    """Return the most steps that one call should run (0 for one step a call), and why.

    The choice depends only on the program and the backend, so a resumed run makes the same choice. On CPUs a block
    saves the dispatch of all its steps but one. XLA, however, runs a convolution inside a loop up to 25 times slower.
    Other backends have not been measured.

    Args:
        jaxpr: of one step.
        batch: one batch.
    """
    config: Any = jax.config
    if jax.default_backend() != "cpu":
        return 0, "several steps per call have not been measured on accelerators"
    if jaxpr.effects:
        return 0, "the step has side effects, such as a print"
    if config.jax_debug_nans or config.jax_debug_infs:
        return 0, "jax_debug_nans and jax_debug_infs check one step at a time"
    if any(equation.primitive.name == "conv_general_dilated" for equation, _ in equations(jaxpr)):
        return 0, "a convolution is slower in a loop on CPUs"
    work = sum(times * product_flops(equation) for equation, times in equations(jaxpr))
    size = sum(getattr(leaf, "nbytes", 4) for leaf in jax.tree.leaves(batch))
    steps, why = min(
        (MOST, "more would gain nothing"),
        (int(FLOPS // max(work, 1)), "a longer call would delay stops and signals"),
        (BYTES // max(size, 1), "more batches would take too much memory at once"),
    )
    return (steps, why) if steps > 1 else (0, why)


def run_block(step: Any, block_size: int, bundle: Any, batches: Batch, rng: Any, due: Any) -> tuple[Any, Any]:
    """Run several steps in one call, to be compiled: one executable for every number of steps.

    Args:
        step: the compiled call of one step.
        block_size: the most steps.
        bundle: what the first step takes.
        batches: stacked, (block size, ...).
        rng: the random key of the run.
        due: for each step which conditional halves are due, (block size, halves); and the number of steps.

    Returns:
        The bundle that the last step returns; and its metrics, with a column (block size,) of each.
    """
    mask, count = due

    def row(i: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (batches, mask))

    def body(i: Any, carry: Any) -> Any:
        bundle, columns = carry
        batch, now = row(i)
        bundle, metrics = step(bundle, batch, rng, now)
        return bundle, jax.tree.map(lambda c, m: jax.lax.dynamic_update_index_in_dim(c, m, i, 0), columns, metrics)

    batch, now = jax.eval_shape(row, 0)
    shapes = jax.eval_shape(step, bundle, batch, rng, now)[1]
    columns = jax.tree.map(lambda m: jnp.zeros((block_size, *m.shape), m.dtype), shapes)
    bundle, columns = jax.lax.fori_loop(0, count, body, (bundle, columns))
    last = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, count - 1, keepdims=False), columns)
    return bundle, (last, columns)
