"""Check that observers do not change a bit of a run, and measure what that costs.

Run: python benchmarks/observers.py [--without] [--short]

The first table trains thirteen small and medium models with one step per call ("plain") and in blocks, without
callbacks and then with each callback that has a compiled half, and compares the bytes of the last state. A callback
whose name ends in "/3" acts at every third step. The second table compares the time of a step with and without what
keeps observers out of the step: the barrier `onstep.compiled.function.isolate`, and for blocks
`onstep.compiled.blocks.COMPILER_OPTIONS`. `--without` also prints the first table without them: the differences that
they prevent.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import figures, interleaved, machine
from onstep import Callback, Engine, every
from onstep.callbacks import EMA, SWA, GradNorm, NaNGuard
from onstep.compiled import blocks, function
from onstep.testing import same_bytes
from workloads import cnn, digits_mlp, one_layer, transformer

STEPS, BLOCK = 24, 8
RANDOM = np.random.default_rng(0)


class ReadsAll(Callback):
    """Reads everything that a compiled half can see."""

    def __init__(self, update_when=1):
        self.update_when = update_when

    def init(self, state):
        return jnp.zeros(5)

    def update(self, carry, ctx):
        trees = (ctx.before, ctx.state, ctx.batch, ctx.metrics, ctx.aux)
        return carry + jnp.stack([optax.tree.norm(jax.tree.map(jnp.float32, tree)) for tree in trees]), ctx


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "EMA": lambda: [EMA(0.9)],
    "EMA/3": lambda: [EMA(0.9, when=3)],
    "SWA/3": lambda: [SWA(start=1, when=3)],
    "GradNorm": lambda: [GradNorm(updates=True, params=True)],
    "GradNorm/3": lambda: [GradNorm(when=3)],
    "NaNGuard": lambda: [NaNGuard()],
    "NaNGuard(state)": lambda: [NaNGuard(state=True)],
    "ReadsAll": lambda: [ReadsAll()],
    "ReadsAll/3": lambda: [ReadsAll(every(3))],
    "all": lambda: [EMA(0.9, when=3), NaNGuard(state=True), GradNorm(updates=True), ReadsAll()],
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A step `(state, batch, rng) -> (state, metrics, aux)`, its first state, and its batches."""

    step: Callable[..., Any]
    state: Any
    batches: list[Any]


def model(forward, loss, params, tx, x, y):
    """Return a model from a forward pass `(params, x, rng) -> outputs` and a loss `(outputs, y) -> losses`."""

    def step(state, batch, rng):
        def mean_loss(params):
            return loss(forward(params, batch["x"], rng), batch["y"]).mean()

        value, grads = jax.value_and_grad(mean_loss)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        return new, {"loss": value}, {"grads": grads}

    batches = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    return Model(step, {"params": params, "opt_state": tx.init(params)}, batches)


def existing(workload):
    """Return a model from a workload of the other benchmarks."""
    size = workload.batch_size
    rows = [slice(n * size, (n + 1) * size) for n in range(STEPS)]
    batches = [{name: array[row] for name, array in workload.arrays.items()} for row in rows]
    return Model(lambda state, batch, rng: workload.step(state, batch), workload.state, batches)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def weights(*shape):
    return normal(*shape) / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)


def classes(count, *shape):
    return RANDOM.integers(0, count, (STEPS, *shape), np.int32)


def dense(*sizes):
    return [{"w": weights(a, b), "b": np.zeros(b, np.float32)} for a, b in itertools.pairwise(sizes)]


def square(outputs, y):
    return (outputs - y) ** 2


entropy = optax.softmax_cross_entropy_with_integer_labels


def linear(params, x, rng):
    return x @ params["w"] + params["b"]


def gains(params, x, rng):
    return jnp.tanh(params["a"] * x) * params["c"] + params["b"] * x


def mlp(activation, dropout=0.0):
    def forward(params, x, rng):
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
            x = jnp.where(jax.random.bernoulli(rng, 1 - dropout, x.shape), x / (1 - dropout), 0) if dropout else x
        return x @ params[-1]["w"] + params[-1]["b"]

    return forward


def recurrent(params, x, rng):
    def cell(hidden, token):
        return jnp.tanh(token @ params["in"] + hidden @ params["hidden"]), None

    hidden, _ = jax.lax.scan(cell, jnp.zeros((len(x), 8)), jnp.swapaxes(x, 0, 1))
    return hidden @ params["out"]


def embedded(params, x, rng):
    return params["table"][x].mean(1) @ params["out"]


def half_precision(params, x, rng):
    half = jax.tree.map(jnp.bfloat16, params)
    return jnp.float32(mlp(jax.nn.relu)(half, jnp.bfloat16(x), rng))


def linear_adam():
    x = normal(STEPS, 8, 2)
    y = x @ np.array([[1], [2]], np.float32) + 0.5 + 0.1 * normal(STEPS, 8, 1)
    return model(
        linear, square, {"w": np.zeros((2, 1), np.float32), "b": np.zeros(1, np.float32)}, optax.adam(1e-2), x, y
    )


def elementwise():
    params, tx = {name: normal(16) for name in "abc"}, optax.sgd(0.03, 0.9)
    return model(gains, square, params, tx, normal(STEPS, 16), normal(STEPS, 16))


def clipped():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS)))
    return model(mlp(jnp.tanh), square, dense(6, 16, 16, 2), tx, normal(STEPS, 8, 6), normal(STEPS, 8, 2))


MODELS: dict[str, Callable[[], Model]] = {
    "linear, 3 parameters, Adam": linear_adam,
    "linear, 6 parameters, momentum": lambda: model(
        linear, square, dense(5, 1)[0], optax.sgd(1e-2, 0.9), normal(STEPS, 8, 5), normal(STEPS, 8, 1)
    ),
    "elementwise, momentum": elementwise,
    "one layer, SGD": lambda: existing(one_layer()),
    "MLP 4-8-3, Adam": lambda: model(
        mlp(jax.nn.relu), entropy, dense(4, 8, 3), optax.adam(1e-2), normal(STEPS, 4, 4), classes(3, 4)
    ),
    "MLP, clipped AdamW": clipped,
    "MLP, dropout, RMSProp": lambda: model(
        mlp(jax.nn.relu, 0.2), entropy, dense(4, 8, 3), optax.rmsprop(1e-2), normal(STEPS, 4, 4), classes(3, 4)
    ),
    "MLP, bfloat16, Lion": lambda: model(
        half_precision, entropy, dense(16, 16, 4), optax.lion(1e-3), normal(STEPS, 8, 16), classes(4, 8)
    ),
    "recurrent, Adam": lambda: model(
        recurrent,
        entropy,
        {"in": weights(3, 8), "hidden": weights(8, 8), "out": weights(8, 4)},
        optax.adam(1e-2),
        normal(STEPS, 4, 6, 3),
        classes(4, 4),
    ),
    "embedding, Adagrad": lambda: model(
        embedded,
        entropy,
        {"table": weights(20, 8), "out": weights(8, 4)},
        optax.adagrad(0.1),
        classes(20, 8, 5),
        classes(4, 8),
    ),
    "MLP 64-256-256-256-10, Adam": lambda: existing(digits_mlp()),
    "CNN, Adam": lambda: existing(cnn()),
    "transformer, AdamW": lambda: existing(transformer(layers=1, width=32)),
}


@contextlib.contextmanager
def without_isolation():
    """Compile in this context without what keeps observers out of the step."""
    isolate, options = function.isolate, blocks.COMPILER_OPTIONS
    function.isolate, blocks.COMPILER_OPTIONS = lambda tree: tree, None
    try:
        yield
    finally:
        function.isolate, blocks.COMPILER_OPTIONS = isolate, options


def last_state(model, callbacks, steps_per_call):
    """Return the state after all batches."""
    engine = Engine(model.step, callbacks, log_every=STEPS, steps_per_call=steps_per_call)
    return engine.run(model.state, model.batches, epochs=1, rng=jax.random.key(7)).state


def differences(models, callbacks):
    """Print which states differ from those of a run without callbacks: P in plain mode, B in blocks."""
    total = differing = 0
    print(f"  {'model':<32}" + "".join(f"{name:>16}" for name in callbacks))
    for name in models:
        made, cells = MODELS[name](), dict.fromkeys(callbacks, "")
        for letter, steps_per_call in (("P", 1), ("B", BLOCK)):
            expected = last_state(made, [], steps_per_call)
            for callback in callbacks:
                same = same_bytes(last_state(made, CALLBACKS[callback](), steps_per_call), expected)
                cells[callback] += "" if same else letter
                total, differing = total + 1, differing + (not same)
        print(f"  {name:<32}" + "".join(f"{cell or '-':>16}" for cell in cells.values()), flush=True)
    print(f"  {differing} of {total} states differ")


def timed(workload, callbacks, steps_per_call, steps):
    """Return a case: a run of the engine, compiled in advance."""
    size = workload.batch_size
    rows = [slice(n * size, (n + 1) * size) for n in range(len(workload.arrays["x"]) // size)]
    batches = [{name: array[row] for name, array in workload.arrays.items()} for row in rows]
    data = [batches[n % len(batches)] for n in range(steps)]
    engine = Engine(workload.step, callbacks, log_every=steps, steps_per_call=steps_per_call)

    def measure():
        start = time.perf_counter()
        jax.block_until_ready(engine.run(workload.state, data, epochs=1).state)
        return (time.perf_counter() - start) / steps

    measure()
    return measure


def costs(cases, rounds):
    """Print the time of a step with isolation over the time without it, with and without callbacks."""
    print(f"  {'workload':<28}{'callbacks':<20}{'µs without':>12}{'µs with':>10}{'ratio':>8}")
    for workload, mode, steps_per_call, steps in cases:
        for name, callbacks in (("none", list), ("EMA and GradNorm", lambda: [EMA(), GradNorm()])):
            with without_isolation():
                bare = timed(workload, callbacks(), steps_per_call, steps)
            pair = {"without": bare, "with": timed(workload, callbacks(), steps_per_call, steps)}
            without, isolated = figures(interleaved(pair, rounds), "without")
            label = f"{workload.name}, {mode}"
            print(
                f"  {label:<28}{name:<20}{without['us']:12.1f}{isolated['us']:10.1f}{isolated['ratio']:8.2f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", action="store_true", help="also count the differences without isolation")
    parser.add_argument("--short", action="store_true", help="two models and one workload, to test this script")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    logging.getLogger("onstep").disabled = True
    print("; ".join(machine(f"{os.cpu_count()} cores").values()))
    models, callbacks = [*MODELS], [*CALLBACKS]
    cases = [
        (one_layer(), "plain", 1, 4000),
        (one_layer(), "blocks", 128, 40_000),
        (digits_mlp(), "plain", 1, 400),
        (cnn(), "plain", 1, 400),
        (transformer(), "plain", 1, 50),
    ]
    if options.short:
        models, callbacks, cases = models[:3:2], ["EMA/3", "GradNorm/3"], [(one_layer(), "blocks", 128, 1000)]
        options.rounds = 3
    print(f"\nstates after {STEPS} steps that differ: P with one step per call, B in blocks of {BLOCK}")
    differences(models, callbacks)
    if options.without:
        print("\nthe same without isolation")
        with without_isolation():
            differences(models, callbacks)
    print(f"\ntime of a step, medians of {options.rounds} rounds")
    costs(cases, options.rounds)


if __name__ == "__main__":
    main()
