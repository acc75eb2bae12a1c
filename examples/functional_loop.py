"""Training as one function call: `state, history = train_loop(state, train_step, data_fn, ...)`.

    python examples/functional_loop.py

For projects that prefer a function to an engine. `train_loop` is a few lines around the engine that
you can copy and change. Here it trains a classifier of malignant and benign tumours on 30
measurements of their cells, with a held-out accuracy of about 96 % after a few seconds.
runs/functional-loop/history.png shows the history. If you interrupt it, run the same command
again to resume.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from onstep import Batches, Callback, Engine, evaluate, every
from onstep.callbacks import Checkpoint, Evaluate, GracefulExit, Progress
from onstep.state import TrainState
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

State, Batch, Metrics = Any, Any, dict[str, Any]
DataFn = Callable[[int], Iterable[Batch]]


def train_loop(
    state: State,
    train_step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]],
    data_fn: DataFn,
    num_epochs: int,
    num_batches: int,
    rng: jax.Array,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 1,
    val_step: Callable[[State, Batch], Metrics] | None = None,
    val_data_fn: DataFn | None = None,
    callbacks: Iterable[Callback] = (),
    show_progress: bool = True,
) -> tuple[State, dict[str, list[float]]]:
    """Train, and return the final state and the history of this session, with one value per epoch.

    Args:
        data_fn: called with 0, 1, ... for each pass over the data; returns its batches.
        num_batches: batches per epoch.
        checkpoint_dir: directory of the run; another call with the same directory resumes it.
        checkpoint_every: epochs between checkpoints.
        val_data_fn: called with 0; returns the batches for `val_step`.
    """
    callbacks = [GracefulExit(), *callbacks]
    if val_step:
        callbacks.append(Evaluate(val_step, val_data_fn, name="val"))
    if checkpoint_dir:
        callbacks.append(Checkpoint(checkpoint_dir, when=every(epochs=checkpoint_every)))
    if show_progress:
        callbacks.append(Progress())
    engine = Engine(train_step, callbacks)
    result = engine.run(state, data_fn, epochs=num_epochs, epoch_steps=num_batches, rng=rng)
    history = {name: values for name, values in result.history.items() if not name.startswith("train/")}
    return result.state, {name.replace("epoch/", "train_").replace("/", "_"): history[name] for name in history}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(2)(nn.Dropout(0.3, deterministic=not train)(x))


def measure(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def train_step(state, batch, rng):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["x"], train=True, rngs={"dropout": rng})
        metrics = measure(logits, batch["y"])
        return metrics["loss"], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), metrics


def val_step(state, batch):
    return measure(state.apply_fn({"params": state.params}, batch["x"], train=False), batch["y"])


def tumours():
    """Return scikit-learn's breast cancer data as a training set and a held-out 30 %."""
    x, y = load_breast_cancer(return_X_y=True)
    x, x_out, y, y_out = train_test_split(x, y.astype(np.int32), test_size=0.3, stratify=y, random_state=0)
    scaler = StandardScaler().fit(x)
    x, x_out = (scaler.transform(part).astype(np.float32) for part in (x, x_out))
    return {"x": x, "y": y}, {"x": x_out, "y": y_out}


def draw(history, last_epoch, path):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training, with dropout"), ("val", "held out")):
            values = history[f"{part}_{metric}"]
            axes.plot(range(last_epoch + 1 - len(values), last_epoch + 1), values, label=label)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, help="default: 20; 8 with --fast")
    add("--seed", type=int, default=0, help="seed of the weights, data order and dropout; default: 0")
    add("--fast", action="store_true", help="a short run, by default in runs/functional-loop-fast")
    add("--directory", type=Path, help="directory of the run; default: runs/functional-loop")
    return parser.parse_args()


def main():
    args = parse_args()
    epochs, target = (8, 0.9) if args.fast else (20, 0.93)
    epochs = args.epochs or epochs
    directory = args.directory or Path("runs", "functional-loop-fast" if args.fast else "functional-loop")
    train, held_out = tumours()
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    model = MLP()
    params = jax.jit(model.init, static_argnames="train")(init_key, train["x"][:1], train=False)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(2e-3))

    data_fn, val_data_fn = Batches(train, 32, seed=args.seed), Batches(held_out, 171, shuffle=False)
    state, history = train_loop(
        state,
        train_step,
        data_fn,
        num_epochs=epochs,
        num_batches=len(data_fn),
        rng=run_key,
        checkpoint_dir=directory,
        val_step=val_step,
        val_data_fn=val_data_fn,
    )
    if history:  # empty if the run was already complete
        draw(history, epochs, directory / "history.png")
        print(f"training loss      {history['train_loss'][0]:.3f} to {history['train_loss'][-1]:.3f}")
    reached = evaluate(val_step, state, val_data_fn)["accuracy"]
    print(f"held-out accuracy  {reached:.4f}" + (f", below the target of {target}" if reached < target else ""))
    return int(reached < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
