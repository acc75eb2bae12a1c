"""Handwritten digits: a small CNN, with every callback that a usual run wants.

    python examples/digits.py                 trains to about 99 %, in seconds on two CPU cores
    python examples/digits.py --help          other optimizers, other data, a shorter run
    tensorboard --logdir runs/digits          shows the curves

The step below is pure, and all that is trained. Everything around it is a callback: averaged
weights, gradient norms, evaluation, early stopping, checkpoints, TensorBoard, a progress bar.

Interrupt it (Ctrl-C) and start it again: it goes on after the last complete epoch, and ends where
it would have ended. A run that is complete is only reported.

The data are the 1,797 images that come with scikit-learn. A fifth is held out: no step trains on
it. Early stopping does look at it, so the accuracy reported is a validation accuracy; it is that
of the last evaluation, not of the best one.
"""

import argparse
import gzip
import math
import struct
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from onstep import Batches, Engine
from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate, GradNorm, Progress, TensorBoard

OPTIMIZERS = {  # each with the learning rate that is its default here
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
    """One step: `rng` is new for each, from the run's key and the number of the step."""
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


def eval_step(state, batch):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return measure(state.apply_fn(variables, batch["image"], train=False), batch["label"])


def measure(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def shift(images, key):
    """Moves each image by up to a pixel either way, at random."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))(padded, corners)


def digits():
    """scikit-learn's digits: what to train on, and the fifth that is held out."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    split = train_test_split(images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0)
    return {"image": split[0], "label": split[2]}, {"image": split[1], "label": split[3]}


def idx_files(directory):
    """Fashion-MNIST, or MNIST: its 60,000 training images, and its 10,000 test images held out."""
    parts = []
    for part in "train", "t10k":
        images = read_idx(directory, f"{part}-images-idx3-ubyte", 3)
        labels = read_idx(directory, f"{part}-labels-idx1-ubyte", 1)
        parts.append({"image": images[..., None].astype(np.float32) / 255, "label": labels.astype(np.int32)})
    return parts


def read_idx(directory, name, dimensions):
    """IDX: a magic number, the size of each dimension, then the bytes."""
    path = directory / name if (directory / name).exists() else directory / f"{name}.gz"
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read()
    header = 4 * (1 + dimensions)
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", content[:header])
    if magic != 0x800 + dimensions or len(content) != header + math.prod(sizes):
        raise ValueError(f"{path} does not hold bytes in {dimensions} dimensions, or not all of them.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="default: 40; 8 with --fast, 3 with --data")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    parser.add_argument("--learning-rate", type=float, help="the highest of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the dropout; default: 0")
    parser.add_argument(
        "--directory",
        type=Path,
        help="for checkpoints and curves, one run in each; default: runs/digits. To start afresh, or with other "
        "settings, delete it or give another one",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--fast", action="store_true", help="a short run, in runs/digits-fast")
    either.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's IDX files, gzipped or not")
    return parser.parse_args()


def main():
    args = arguments()
    name, epochs, least = ("digits-fast", 8, 0.95) if args.fast else ("digits", 40, 0.975)
    if args.data:
        name, epochs, least = args.data.resolve().name, 3, 0
    epochs = args.epochs or epochs
    directory = args.directory or Path("runs") / name

    train, held_out = idx_files(args.data) if args.data else digits()
    batches = Batches(train, args.batch_size, seed=args.seed)
    steps = epochs * len(batches)
    optimizer, rate = OPTIMIZERS[args.optimizer]
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate or rate, steps // 10, steps)

    model, (init_key, run_key) = CNN(), jax.random.split(jax.random.key(args.seed))
    variables = model.init(init_key, train["image"][:1], train=False)
    state = State.create(apply_fn=model.apply, tx=optimizer(schedule), **variables)

    size = "x".join(map(str, train["image"].shape[1:3]))
    print(f"data       {name}: {len(train['label']):,} images of {size}, and {len(held_out['label']):,} held out")
    print(f"model      CNN with {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")
    print(f"run        {epochs} epochs of {len(batches)} steps, {args.optimizer}, in {directory}", flush=True)

    # The averages of the weights need BatchNorm statistics of their own: averaged over the same steps.
    ema = EMA(0.99, of=("params", "batch_stats"), warmup=9)
    callbacks = [
        ema,
        GradNorm(),
        Evaluate(eval_step, Batches(held_out, 1000, shuffle=False, drop_last=False), name="val", using=ema),
        EarlyStopping("val/loss", patience=10),
        Checkpoint(directory),
        TensorBoard(directory),
        Progress(metrics=["train/loss", "val/loss", "val/accuracy"]),
    ]
    engine = Engine(train_step, callbacks, log_every=20)
    began = time.perf_counter()
    try:
        result = engine.run(state, batches, epochs=epochs, rng=run_key)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on after the last complete epoch.", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - began

    accuracy = result.latest["val/accuracy"]
    if evaluations := len(result.history.get("val/accuracy", [])):
        rate = evaluations * len(batches) / seconds
        print(f"trained    {evaluations} epochs in {seconds:.1f} s: {rate:.0f} steps/s, all included")
    else:
        print(f"trained    nothing: the run in {directory} was complete")
    if result.stopped:
        print(f"stopped    after epoch {result.epoch}: {result.stopped}")
    print(f"written    checkpoints and TensorBoard files, in {directory}")
    print(f"curves     tensorboard --logdir {directory}")
    print(f"held-out accuracy  {accuracy:.4f}")
    if accuracy < least:
        print(f"That is less than the {least} that this run should reach.")
    return int(accuracy < least)


if __name__ == "__main__":
    sys.exit(main())
