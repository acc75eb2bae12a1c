"""The workloads: steps of different sizes, with their states and data.

Each is a real training step on synthetic data, written in plain JAX and Optax, so that every loop
can run the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step with its state and data.

    Attributes:
        step: `(state, batch) -> (state, metrics, aux)`.
        score: `(state, batch) -> metrics`, for evaluations.
        state: the initial state.
        arrays: the examples, (examples, ...), for `onstep.Batches`.
        batch_size: examples in a batch.
        steps: steps per measurement, which take about half a second.
    """

    name: str
    step: Callable[..., Any]
    score: Callable[..., Any]
    state: Any
    arrays: dict[str, np.ndarray]
    batch_size: int
    steps: int


def trained(name, forward, params, tx, arrays, batch_size, steps):
    """Create a workload from a forward pass `(params, x) -> logits` and an optimizer."""

    def losses(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch["x"]), batch["y"])

    def step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: losses(p, batch).mean())(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        return new, {"loss": loss}, {"grads": grads}

    def score(state, batch):
        return {"loss": losses(state["params"], batch).mean()}

    return Workload(name, step, score, {"params": params, "opt_state": tx.init(params)}, arrays, batch_size, steps)


def examples(count, shape, classes, *, tokens=None):
    random = np.random.default_rng(0)
    x = (
        random.normal(size=(count, *shape)).astype(np.float32)
        if tokens is None
        else random.integers(0, tokens, (count, *shape), np.int32)
    )
    return {"x": x, "y": random.integers(0, classes, (count, *shape) if tokens else count, np.int32)}


def matrix(key, *shape):
    return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def dense(sizes):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [{"w": matrix(k, a, b), "b": jnp.zeros(b)} for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def one_layer():
    """W1: one layer, 64 to 10, batch 8, plain gradient descent; about 20 µs per call."""
    return trained("W1 one layer", mlp, dense([64, 10]), optax.sgd(0.1), examples(8 * 2000, (64,), 10), 8, 20_000)


def digits_mlp():
    """W3: an MLP 64-256-256-256-10 with Adam, batch 128."""
    data = examples(128 * 50, (64,), 10)
    return trained("W3 MLP", mlp, dense([64, 256, 256, 256, 10]), optax.adam(1e-3), data, 128, 5000)


def cnn():
    """W4: two convolutions and a head on 16 x 16 images with Adam, batch 32."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    params = {"a": matrix(a, 3, 3, 1, 16), "b": matrix(b, 3, 3, 16, 32), "head": matrix(c, 512, 10)}

    def forward(params, x):
        for name in ("a", "b"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.reshape(len(x), -1) @ params["head"]

    data = examples(32 * 50, (16, 16, 1), 10)
    return trained("W4 CNN", forward, params, optax.adam(1e-3), data, 32, 5000)


def transformer(layers=4, width=64, heads=4, length=32, vocabulary=64):
    """W4: a causal transformer of 4 layers, width 64, 32 tokens, batch 8, with AdamW."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * layers + 3))

    def block():
        return {
            "qkv": matrix(next(keys), width, 3 * width),
            "out": matrix(next(keys), width, width),
            "up": matrix(next(keys), width, 4 * width),
            "down": matrix(next(keys), 4 * width, width),
        }

    params = {
        "embed": matrix(next(keys), vocabulary, width),
        "place": matrix(next(keys), length, width),
        "blocks": [block() for _ in range(layers)],
        "head": matrix(next(keys), width, vocabulary),
    }

    def forward(params, tokens):
        x = params["embed"][tokens] + params["place"]
        for p in params["blocks"]:
            q, k, v = jnp.split((jax.nn.standardize(x) @ p["qkv"]).reshape(*x.shape[:2], heads, -1), 3, axis=-1)
            x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["out"]
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]
        return x @ params["head"]

    data = examples(8 * 50, (length,), vocabulary, tokens=vocabulary)
    return trained("W4 transformer", forward, params, optax.adamw(1e-3), data, 8, 500)


def many_leaves(leaves=256):
    """A state of 256 small leaves, to measure the cost of a call per leaf."""
    params = {f"p{i}": jnp.ones(4) for i in range(leaves)}

    def step(state, batch):
        new = jax.tree.map(lambda p: p - 1e-3 * (p - batch["x"].mean()), state["params"])
        return {"params": new}, {"loss": batch["x"].mean()}, {}

    data = {"x": np.ones((8 * 500, 4), np.float32)}
    return Workload(
        "256 leaves", step, lambda state, batch: {"loss": batch["x"].mean()}, {"params": params}, data, 8, 2000
    )


WORKLOADS = {"W1": one_layer, "W3": digits_mlp, "CNN": cnn, "transformer": transformer, "leaves": many_leaves}
