"""One of two projects that share their callbacks: regression, with a state that is a plain dict.

    pip install -e examples/two_projects/shared_callbacks
    python examples/two_projects/project_a.py

Predicts how far diabetes has gone a year later from ten measurements. In one batch of twenty the
targets are in another unit, as happens where data come from many places; `SkipSpikes` undoes all
these steps, and no other. About 36 % of the variance among the patients held out is explained;
without the callback predictions are worse than the mean. A few seconds on two CPU cores.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep import Batches, Engine
from onstep.callbacks import EMA, Evaluate
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from team_callbacks import usual

OPTIMIZER = optax.adam(3e-3)


def predict(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def step(state, batch):
    def loss_fn(params):
        return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, optimizer = OPTIMIZER.update(grads, state["optimizer"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, {"loss": loss}


def score(state, batch):
    return {"explained": 1 - jnp.mean((predict(state["params"], batch["x"]) - batch["y"]) ** 2) / batch["y"].var()}


def patients():
    """scikit-learn's diabetes data: what to train on, and the quarter that is held out."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    split = [part.astype(np.float32) for part in train_test_split(x, y, random_state=0)]
    return {"x": split[0], "y": split[2]}, {"x": split[1], "y": split[3]}


def from_many_places(batches, seed):
    """The batches, after the first epoch one of twenty in another unit; the same whenever they are read again."""

    def epoch(number):
        rng = np.random.default_rng((seed, number))
        for batch in batches(number):
            spoiled = number > 0 and rng.random() < 0.05
            yield {"x": batch["x"], "y": batch["y"] * (1000 if spoiled else 1)}

    return epoch


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, help="default: 40; 15 with --fast")
    add("--seed", type=int, default=0, help="of the weights, the order and the faults; default: 0")
    add("--fast", action="store_true", help="a short run, by default in runs/project-a-fast")
    add("--directory", type=Path, help="of one run; default: runs/project-a")
    return parser.parse_args()


def main():
    args = arguments()
    epochs, least = (15 if args.fast else 40), 0.3
    directory = args.directory or Path("runs", "project-a-fast" if args.fast else "project-a")
    train, held_out = patients()
    keys = jax.random.split(jax.random.key(args.seed))
    params = {
        "in": jax.random.normal(keys[0], (10, 8)) / 10,
        "bias": jnp.zeros(8),
        "out": jax.random.normal(keys[1], (8,)) / 10,
    }
    state = {"params": params, "optimizer": OPTIMIZER.init(params)}
    ema = EMA(0.98)
    whole = Batches(held_out, len(held_out["y"]), shuffle=False)
    engine = Engine(step, [*usual(directory), ema, Evaluate(score, whole, name="val", using=ema)])
    data = from_many_places(Batches(train, 16, seed=args.seed), args.seed)
    result = engine.run(state, data, epochs=args.epochs or epochs)

    reached = result.latest["val/explained"]
    print(f"undone              {engine.callbacks['SkipSpikes'].skipped(result)} of {result.step} steps")
    print(f"variance explained  {reached:.3f}" + (f", short of {least}" if reached < least else ""))
    return int(reached < least)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)
