"""Train a small CNN on handwritten digits, with all the callbacks of a typical run.

    python examples/digits.py                           trains to about 99 % accuracy, in seconds on two CPU cores
    python -m tensorboard.main --logdir runs/digits     shows the curves

The step is a pure function. Everything around it is a callback, from averaged weights to the
progress bar. Interrupt the script (Ctrl-C) and run it again: it resumes where it stopped, with the
same final result. If the run is already complete, the script only reports its result.
`runs/digits/digits.png` shows the images with the least confident predictions.

The data are the 1,797 images that come with scikit-learn. A fifth is held out and never trained
on. Early stopping uses it, so the reported accuracy is a validation accuracy. It is the accuracy
at the last evaluation, not at the best one.
"""

import argparse
import gzip
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from onstep import Batches, Engine
from onstep.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    GracefulExit,
    GradNorm,
    NaNGuard,
    Progress,
    TensorBoard,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

OPTIMIZERS = {  # with the default learning rate of each
    "adam": (optax.adam, 3e-3),
    "adamw": (optax.adamw, 3e-3),
    "sgd": (lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 5e-2),
}


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features, stride in (32, 1), (64, 2), (64, 2):
            x = nn.Conv(features, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class State(TrainState):
    batch_stats: Any


def train_step(state, batch, rng):
    """Train on one batch; `rng` is a new key for every step, derived from the run's key."""
    shift_key, dropout_key = jax.random.split(rng)
    images = shift(batch["image"], shift_key)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, images, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        metrics = measure(logits, batch["label"])
        return metrics["loss"], (metrics, updates["batch_stats"])

    grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics, {"grads": grads}


def predict(state, images):
    return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, images, train=False)


def eval_step(state, batch):
    return measure(predict(state, batch["image"]), batch["label"])


def measure(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def shift(images, key):
    """Shift each image at random by up to one pixel in each direction."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))(padded, corners)


def digits():
    """Return scikit-learn's digits as a training set and a held-out fifth."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    split = train_test_split(images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0)
    return {"image": split[0], "label": split[2]}, {"image": split[1], "label": split[3]}


def idx_files(directory):
    """Return Fashion-MNIST or MNIST: 60,000 images to train on, and the test set of 10,000 images as held-out data."""
    parts = []
    for part in "train", "t10k":
        images = read_idx(directory / f"{part}-images-idx3-ubyte", 3)
        labels = read_idx(directory / f"{part}-labels-idx1-ubyte", 1)
        parts.append({"image": images[..., None].astype(np.float32) / 255, "label": labels.astype(np.int32)})
    return parts


def read_idx(path, dimensions):
    """Read an IDX file, plain or gzipped: a magic number, the size of each dimension, then the bytes."""
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_suffix(".gz").read_bytes())
    magic, *sizes = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
    header = 4 + 4 * dimensions
    if magic != 0x800 + dimensions or len(content) != header + math.prod(sizes):
        raise ValueError(f"{path} needs to be a complete IDX file of bytes in {dimensions} dimensions.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, help="epochs, and length of the schedule; default: 30; 8 with --fast, 3 with --data")
    add("--batch-size", type=int, default=64, help="default: 64")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    add("--learning-rate", type=float, help="peak of the schedule; the default depends on the optimizer")
    add("--seed", type=int, default=0, help="seed of the weights, data order, dropout and shifts; default: 0")
    add("--directory", type=Path, help="directory of the run; delete it to start from scratch; default: runs/digits")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--fast", action="store_true", help="a short run, by default in runs/digits-fast")
    add("--data", type=Path, metavar="DIR", help="train on the (Fashion-)MNIST files in DIR; by default in runs/<DIR>")
    return parser.parse_args()


def new_state(key, images, optimizer, schedule):
    model = CNN()
    variables = jax.jit(model.init, static_argnames="train")(key, images[:1], train=False)
    return State.create(apply_fn=model.apply, tx=optimizer(schedule), **variables)


def draw(path, history, data, logits):
    """Draw the accuracy curves and the images with the least confident predictions."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    for name, label in ("epoch", "training, shifted, with dropout"), ("val", "held out, averaged weights"):
        axes.plot(history.steps(f"{name}/accuracy"), history[f"{name}/accuracy"], ".-", label=label)
    axes.set(title="accuracy by epoch", xlabel="step", ylabel="accuracy", ylim=(0.8, 1.01))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    right.suptitle("the least confident predictions on held-out images; red if wrong")
    order = np.asarray(jax.nn.softmax(logits).max(-1)).argsort()
    for axes, number in zip(right.subplots(4, 8).flat, order, strict=False):
        axes.imshow(data["image"][number, ..., 0], cmap="gray_r")
        predicted, label = int(logits[number].argmax()), data["label"][number]
        axes.set_title(predicted, color="0.3" if predicted == label else "red")
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def report(result, directory, epoch_steps, seconds):
    if epochs := len(result.history.get("val/accuracy", [])):
        speed = epochs * epoch_steps / seconds
        print(f"trained    {epochs} epochs in {seconds:.1f} s ({speed:.0f} steps/s, compilation included)")
    else:
        print("trained    nothing: the run was already complete")
    if result.stopped:
        print(f"stopped    after epoch {result.epoch}: {result.stopped}")
    print(f"saved      checkpoints, TensorBoard files and digits.png, in {directory}")
    print(f"curves     {os.path.relpath(sys.executable)} -m tensorboard.main --logdir {directory}")


def main():
    args = parse_args()
    name, epochs, target = (args.data.resolve().name, 3, 0) if args.data else ("digits", 30, 0.975)
    if args.fast:
        epochs, target = 8, 0.95
    epochs = args.epochs or epochs
    directory = args.directory or Path("runs", f"{name}-fast" if args.fast else name)

    train, held_out = idx_files(args.data) if args.data else digits()
    batches = Batches(train, args.batch_size, seed=args.seed)
    steps = epochs * len(batches)
    optimizer, rate = OPTIMIZERS[args.optimizer]
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate or rate, steps // 10, steps)
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    state = new_state(init_key, train["image"], optimizer, schedule)

    count, height, width, _ = train["image"].shape
    print(f"data       {name}: {count:,} images of {height}x{width}, and {len(held_out['label']):,} held out")
    print(f"model      CNN of {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")
    print(f"run        {epochs} epochs of {len(batches)} steps with {args.optimizer}, in {directory}", flush=True)

    # Averaged weights need matching BatchNorm statistics, averaged over the same steps.
    ema = EMA(0.99, of=("params", "batch_stats"), warmup=9)
    callbacks = [
        GracefulExit(),
        NaNGuard(),
        ema,
        GradNorm(),
        Evaluate(eval_step, Batches(held_out, 1000, shuffle=False, drop_last=False), name="val", using=ema),
        EarlyStopping("val/loss", patience=10),
        Checkpoint(directory, best="val/loss"),
        TensorBoard(directory),
        Progress(),
    ]
    start = time.perf_counter()
    result = Engine(train_step, callbacks, log_every=20).run(state, batches, epochs=epochs, rng=run_key)
    report(result, directory, len(batches), time.perf_counter() - start)
    if result.history:  # empty if the run was already complete
        first = {name: values[:1000] for name, values in held_out.items()}
        draw(directory / "digits.png", result.history, first, predict(ema.apply(result), first["image"]))

    accuracy = result.latest["val/accuracy"]
    print(f"held-out accuracy  {accuracy:.4f}" + (f", below the target of {target}" if accuracy < target else ""))
    return int(accuracy < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
