"""The first of two projects that share their callbacks: regression, with a plain dict as the state.

    pip install -e examples/two_projects/shared_callbacks
    python examples/two_projects/project_a.py

Predicts the progression of diabetes after one year from ten measurements. In 5 % of the batches the
targets are in another unit, which can happen when data come from several sources. `SkipSpikes` skips
exactly these steps. The model explains about 36 % of the variance among held-out patients; without
the callback its predictions are worse than the mean. Takes a few seconds on two CPU cores.
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
    """Return scikit-learn's diabetes data as a training set and a held-out quarter."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    split = [part.astype(np.float32) for part in train_test_split(x, y, random_state=0)]
    return {"x": split[0], "y": split[2]}, {"x": split[1], "y": split[3]}


def with_wrong_units(batches, seed):
    """Return a data source that corrupts 5 % of the batches after the first epoch, reproducibly."""

    def epoch(number):
        rng = np.random.default_rng((seed, number))
        for batch in batches(number):
            corrupt = number > 0 and rng.random() < 0.05
            yield {"x": batch["x"], "y": batch["y"] * (1000 if corrupt else 1)}

    return epoch


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, help="default: 40; 15 with --fast")
    add("--seed", type=int, default=0, help="seed of the weights, data order and faults; default: 0")
    add("--fast", action="store_true", help="a short run, by default in runs/project-a-fast")
    add("--directory", type=Path, help="directory of the run; default: runs/project-a")
    return parser.parse_args()


def main():
    args = parse_args()
    epochs, target = (15 if args.fast else 40), 0.3
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
    tests = Batches(held_out, len(held_out["y"]), shuffle=False)
    engine = Engine(step, [*usual(directory), ema, Evaluate(score, tests, name="val", using=ema)])
    data = with_wrong_units(Batches(train, 16, seed=args.seed), args.seed)
    result = engine.run(state, data, epochs=args.epochs or epochs)

    reached = result.latest["val/explained"]
    print(f"skipped steps       {engine.callbacks['SkipSpikes'].skipped(result)} of {result.step}")
    print(f"variance explained  {reached:.3f}" + (f", below the target of {target}" if reached < target else ""))
    return int(reached < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
