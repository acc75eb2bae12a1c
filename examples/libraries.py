"""The same training run with Flax Linen, Flax NNX, Equinox and Haiku.

    python examples/libraries.py --library linen
    python examples/libraries.py --library nnx          modules are the state; the step changes them in place
    python examples/libraries.py --library nnx-split    the arrays of the modules are the state
    python examples/libraries.py --library equinox
    python examples/libraries.py --library haiku

The network has batch normalization and dropout, so besides the parameters there are running
statistics to update and random keys to pass on. For each library, one function shows how to write
the state, the step and the score. Data, callbacks and everything else are the same for all. Copy
the function for your library.

Each run trains on handwritten digits and reaches about 97 % accuracy on a held-out fifth in a few
seconds. If you interrupt it, run the same command again to resume.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from onstep import Batches, Engine
from onstep.callbacks import Checkpoint, Evaluate, GracefulExit, GradNorm, NaNGuard
from onstep.state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

PIXELS, WIDTH, CLASSES = 64, 128, 10
DROPOUT, MOMENTUM = 0.2, 0.9


class State(NamedTuple):
    """The state for Equinox and Haiku. Callbacks find the parameters by their name: `EMA(0.99)`, `Summary()`."""

    params: Any
    statistics: Any
    opt_state: Any


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    return {"accuracy": (logits.argmax(-1) == labels).mean()}


def linen_run(key, optimizer):
    """The state is a TrainState: parameters, running statistics and the state of the optimizer."""

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(linen.Dense(WIDTH)(x))
            x = linen.Dropout(DROPOUT, deterministic=not train)(linen.relu(x))
            return linen.Dense(CLASSES)(x)

    model = Network()
    variables = model.init(key, jnp.zeros((1, PIXELS)), train=False)
    state = TrainState.create(apply_fn=model.apply, tx=optimizer, **variables)

    def step(state, batch, rng):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(
                variables, batch["image"], train=True, rngs={"dropout": rng}, mutable="batch_stats"
            )
            return cross_entropy(logits, batch["label"]), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **updates), {"loss": loss}, {"grads": grads}

    def score(state, batch):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return accuracy(model.apply(variables, batch["image"], train=False), batch["label"])

    return state, step, score


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(PIXELS, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def nnx_loss(model, batch):
    return cross_entropy(model(batch["image"]), batch["label"])


def nnx_run(key, optimizer):
    """The state is the model and the optimizer; the step changes both in place and returns them.

    The model has a random stream of its own, so the step takes no key. Callbacks find the model by its position in
    the state: `EMA(0.99, of="0")`.
    """
    model = NNXNetwork(nnx.Rngs(key))

    def step(state, batch):
        model, optimizer = state
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return (model, optimizer), {"loss": loss}, {"grads": grads}

    def score(state, batch):
        model = nnx.view(state[0], deterministic=True, use_running_average=True)
        return accuracy(model(batch["image"]), batch["label"])

    return (model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)), step, score


def nnx_split_run(key, optimizer):
    """The state is the arrays of the model and the optimizer; `nnx.merge` rebuilds both objects from them."""
    model = NNXNetwork(nnx.Rngs(key))
    graph, state = nnx.split((model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), {"loss": loss}, {"grads": grads}

    def score(state, batch):
        model, _ = nnx.merge(graph, state)
        model = nnx.view(model, deterministic=True, use_running_average=True)
        return accuracy(model(batch["image"]), batch["label"])

    return state, step, score


def equinox_run(key, optimizer):
    """The state is the arrays of the model, its running statistics and the state of the optimizer.

    A model also has parts that are not arrays, such as functions. `partition` separates them from the arrays, and
    `combine` puts the model together again.
    """
    eqx = import_library("equinox")

    class Network(eqx.Module):
        hidden: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.hidden = eqx.nn.Linear(PIXELS, WIDTH, key=keys[0])
            self.norm = eqx.nn.BatchNorm(WIDTH, "batch", momentum=MOMENTUM, mode="batch")
            self.dropout = eqx.nn.Dropout(DROPOUT)
            self.out = eqx.nn.Linear(WIDTH, CLASSES, key=keys[1])

        def __call__(self, x, statistics, key):
            x, statistics = self.norm(self.hidden(x), statistics)
            return self.out(self.dropout(jax.nn.relu(x), key=key)), statistics

    model, statistics = eqx.nn.make_with_state(Network)(key)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def step(state, batch, rng):
        params, statistics, opt_state = state

        def loss_fn(params):
            keys = jax.random.split(rng, len(batch["image"]))
            apply = jax.vmap(eqx.combine(params, static), in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
            logits, updates = apply(batch["image"], statistics, keys)
            return cross_entropy(logits, batch["label"]), updates

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return State(eqx.apply_updates(params, updates), statistics, opt_state), {"loss": loss}, {"grads": grads}

    def score(state, batch):
        model = eqx.nn.inference_mode(eqx.combine(state.params, static))
        apply = jax.vmap(model, in_axes=(0, None, None), out_axes=(0, None))
        logits, _ = apply(batch["image"], state.statistics, None)
        return accuracy(logits, batch["label"])

    return State(params, statistics, optimizer.init(params)), step, score


def haiku_run(key, optimizer):
    """The state is the parameters, the running statistics and the state of the optimizer."""
    hk = import_library("haiku")

    def network(x, train):
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM)(hk.Linear(WIDTH)(x), train)
        x = jax.nn.relu(x)
        x = hk.dropout(hk.next_rng_key(), DROPOUT, x) if train else x
        return hk.Linear(CLASSES)(x)

    model = hk.transform_with_state(network)
    params, statistics = model.init(key, jnp.zeros((1, PIXELS)), train=True)

    def step(state, batch, rng):
        params, statistics, opt_state = state

        def loss_fn(params):
            logits, updates = model.apply(params, statistics, rng, batch["image"], train=True)
            return cross_entropy(logits, batch["label"]), updates

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return State(optax.apply_updates(params, updates), statistics, opt_state), {"loss": loss}, {"grads": grads}

    def score(state, batch):
        logits, _ = model.apply(state.params, state.statistics, None, batch["image"], train=False)
        return accuracy(logits, batch["label"])

    return State(params, statistics, optimizer.init(params)), step, score


def import_library(name):
    """Import an optional library, or exit and say how to install it."""
    try:
        return __import__(name)
    except ImportError:
        package = {"haiku": "dm-haiku"}.get(name, name)
        sys.exit(f"--library {name} needs {name.capitalize()}: pip install {package}")


LIBRARIES = {
    "linen": linen_run,
    "nnx": nnx_run,
    "nnx-split": nnx_split_run,
    "equinox": equinox_run,
    "haiku": haiku_run,
}


def digits():
    """Return scikit-learn's digits as a training set and a held-out fifth."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return {"image": split[0], "label": split[2]}, {"image": split[1], "label": split[3]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--library", choices=LIBRARIES, default="linen", help="default: linen")
    add("--epochs", type=int, help="default: 15; 5 with --fast")
    add("--seed", type=int, default=0, help="seed of the weights, data order and dropout; default: 0")
    add("--fast", action="store_true", help="a short run")
    add("--directory", type=Path, help="directory of the run; default: runs/libraries-<library>[-fast]")
    return parser.parse_args()


def main():
    args = parse_args()
    epochs, target = (5, 0.93) if args.fast else (15, 0.955)
    directory = args.directory or Path("runs", f"libraries-{args.library}" + "-fast" * args.fast)
    train, held_out = digits()
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    state, step, score = LIBRARIES[args.library](init_key, optax.adam(2e-3))
    callbacks = [
        GracefulExit(),
        NaNGuard(),
        GradNorm(),
        Evaluate(score, Batches(held_out, 120, shuffle=False, drop_last=False), name="val"),
        Checkpoint(directory),
    ]
    engine = Engine(step, callbacks)

    @engine.on("epoch_end")
    def show(loop):
        print(f"epoch {loop.epoch:3}  loss {loop.latest['epoch/loss']:.4f}  accuracy {loop.latest['val/accuracy']:.4f}")

    result = engine.run(state, Batches(train, 32, seed=args.seed), epochs=args.epochs or epochs, rng=run_key)
    reached = result.latest["val/accuracy"]
    print(f"held-out accuracy  {reached:.4f}" + (f", below the target of {target}" if reached < target else ""))
    return int(reached < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
