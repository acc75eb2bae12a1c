"""Find the operation that made a NaN, inside a layer of a scanned transformer.

    python examples/find_nan.py

A transformer reads handwritten digits, a row of pixels at a time. Its attention divides the scores by
their standard deviation, without an epsilon. One of the images is blank, as if the scanner had failed:
all its rows are equal, the deviation is zero, and the loss becomes NaN. `NaNGuard` stops the run, and
its error ends with the command that replays the step. The script then does the same from Python, and
prints the operation, its line, and the iteration of the scan, which is the layer.
"""

import argparse
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep import Batches, Engine
from onstep.callbacks import Checkpoint, NaNGuard
from sklearn.datasets import load_digits

ROWS, WIDTH, CLASSES, BLANK = 8, 32, 10, 700  # BLANK is the number of the blank image


def normalize(x):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)


def attend(x, weights):
    query, key, value = jnp.split(x @ weights["attention"], 3, axis=-1)
    scores = query @ jnp.swapaxes(key, -1, -2)
    scores = scores / scores.std((-1, -2), keepdims=True)  # the mistake
    return jax.nn.softmax(scores) @ value


def layer(x, weights):
    x = x + attend(normalize(x), weights)
    return x + jax.nn.gelu(normalize(x) @ weights["up"]) @ weights["down"], None


def loss_fn(params, batch):
    x, _ = jax.lax.scan(layer, batch["image"] @ params["in"], params["layers"])
    logits = normalize(x.mean(-2)) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


optimizer = optax.adam(1e-3)


def step(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), {"loss": loss}


def new_state(key, layers):
    def matrix(key, *shape):
        return jax.random.normal(key, shape) / np.sqrt(shape[-2])

    keys = jax.random.split(key, 5)
    params = {
        "in": matrix(keys[0], ROWS, WIDTH),
        "layers": {
            "attention": matrix(keys[1], layers, WIDTH, 3 * WIDTH),
            "up": matrix(keys[2], layers, WIDTH, 4 * WIDTH),
            "down": matrix(keys[3], layers, 4 * WIDTH, WIDTH),
        },
        "out": matrix(keys[4], WIDTH, CLASSES),
    }
    return params, optimizer.init(params)


def digits():
    """Return scikit-learn's digits, of which one is blank."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, ROWS, ROWS)
    images[BLANK] = 0
    return {"image": images, "label": labels.astype(np.int32)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of the weights and data order; default: 0")
    add("--fast", action="store_true", help="2 layers instead of 6")
    add("--directory", type=Path, help="directory of the run; default: runs/find-nan[-fast]")
    return parser.parse_args()


def main():
    args = parse_args()
    directory = args.directory or Path("runs", "find-nan" + "-fast" * args.fast)
    state = new_state(jax.random.key(args.seed), 2 if args.fast else 6)
    data = Batches(digits(), 32, seed=args.seed)
    engine = Engine(step, [NaNGuard(), Checkpoint(directory, when=20)])
    try:
        engine.run(state, data, epochs=2)
    except FloatingPointError as error:
        print(error)
        number = int(re.search(r"at step (\d+)", str(error))[1])
    else:
        print("no step made a NaN")
        return 1

    moment = engine.replay(state, data, directory, step=number, epochs=2)
    blank = np.flatnonzero((moment.batch["image"] == 0).all((1, 2)))
    print(f"\nstep {number}, replayed from checkpoint {moment.checkpoint}: image {blank} of the batch is blank")
    found = moment.first_bad()
    print(f"first bad operation  {found}")
    return int(found is None or found.operation != "div")


if __name__ == "__main__":
    sys.exit(main())
