"""Train a mean teacher (Tarvainen and Valpola, 2017): digits learned from 40 labels and many unlabelled images.

    python examples/mean_teacher.py      compares it with training on the labels only, over five seeds, in a minute

The teacher is a field of the state that follows the student through `Target`. The student learns
from the labels, and to agree with the teacher on unlabelled images, which are shifted and noised
independently for each. The baseline runs give this agreement a weight of 0. Nothing else differs:
labels, initial weights, shifts and noise are the same, and both are evaluated with averaged weights.
The weight is in the state, so one Engine does all runs and compiles the step once.

On 450 held-out digits, training on the labels only reaches 89 % accuracy and the mean teacher 95 %.
All of 13 seeds improved, by 2 to 10 points. `runs/mean-teacher/mean-teacher.png` shows the curves
and the digits.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from onstep import Batches, Engine, every
from onstep.callbacks import Evaluate
from onstep.callbacks.target import Target
from onstep.state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

WEIGHT, RAMP = 3.0, 400  # weight of the agreement, and steps of its warmup
NETWORK = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
OPTIMIZER = optax.adam(2e-3)
ARMS = {"labels only": 0.0, "mean teacher": WEIGHT}


class State(TrainState):
    target: Any
    weight: jax.Array


def new_state(seed, weight):
    params = NETWORK.init(jax.random.key(seed), jnp.zeros((1, 64)))
    return State.create(apply_fn=NETWORK.apply, params=params, target=params, tx=OPTIMIZER, weight=jnp.float32(weight))


def augment(images, key):
    """Shift each image by up to one pixel in each direction, and add noise."""
    shift_key, noise_key = jax.random.split(key)
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 3)
    shifted = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (8, 8)))(padded, corners)
    return shifted.reshape(-1, 64) + 0.15 * jax.random.normal(noise_key, images.shape)


def train_step(state, batch, rng):
    label_key, student_key, teacher_key = jax.random.split(rng, 3)
    weight = state.weight * jnp.exp(-5 * (1 - jnp.minimum(state.step / RAMP, 1)) ** 2)
    teacher = nn.softmax(state.apply_fn(state.target, augment(batch["unlabelled"], teacher_key)))

    def loss_fn(params):
        logits = state.apply_fn(params, augment(batch["image"], label_key))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        student = nn.softmax(state.apply_fn(params, augment(batch["unlabelled"], student_key)))
        disagreement = ((student - teacher) ** 2).sum(-1).mean()
        return loss + weight * disagreement, {"loss": loss, "disagreement": disagreement}

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), metrics


def predict(state, images):
    return state.apply_fn(state.target, images).argmax(-1)


def eval_step(state, batch):
    return {"accuracy": (predict(state, batch["image"]) == batch["label"]).mean()}


def labelled_subset(images, labels, seed):
    """Return four images of each digit, with their labels."""
    generator = np.random.default_rng(seed)
    rows = [generator.choice(np.flatnonzero(labels == digit), 4, replace=False) for digit in range(10)]
    rows = np.stack(rows, axis=1).ravel()
    return {"image": images[rows], "label": labels[rows]}


def mixed_batches(labelled, images, seed):
    """Return a data source whose batches hold all labelled digits and 100 unlabelled ones."""
    batches = Batches(images, 100, seed=seed)
    return lambda epoch: ({"unlabelled": batch, **labelled} for batch in batches(epoch))


def show_images(axes, title, images):
    """Draw the first 40 images, dark on light; fill up with grey if there are fewer."""
    images = np.concatenate([images, np.full((40, 64), 0.2)])[:40].reshape(4, 10, 8, 8)
    framed = np.pad(1 - images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.8)
    axes.imshow(framed.swapaxes(1, 2).reshape(40, 100), cmap="gray", vmin=0, vmax=1)
    axes.set(title=title, xticks=[], yticks=[])


def draw(path, labelled, gained, curves, steps):
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplot_mosaic([["labelled", "curves"], ["gained", "curves"]])
    show_images(axes["labelled"], "the 40 labelled digits of the first seed", labelled)
    show_images(axes["gained"], "held-out digits that only the mean teacher recognizes", gained)
    for color, (arm, runs) in enumerate(curves.items()):
        axes["curves"].plot(steps, np.transpose(runs), f"C{color}", alpha=0.3)
        axes["curves"].plot(steps, np.mean(runs, axis=0), f"C{color}", linewidth=3, label=f"{arm}, mean of the seeds")
    axes["curves"].set(title="held-out accuracy", xlabel="step", ylabel="accuracy", ylim=(0.7, 1))
    axes["curves"].legend(loc="lower right")
    axes["curves"].grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed of labels, weights and data order; default: 0")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: 5; 2 with --fast")
    parser.add_argument("--fast", action="store_true", help="1,000 steps instead of 2,000, in runs/mean-teacher-fast")
    parser.add_argument("--directory", type=Path, help="directory of the picture; default: runs/mean-teacher")
    args = parser.parse_args()
    steps, seeds, target = (1_000, 2, 0.02) if args.fast else (2_000, 5, 0.03)
    directory = args.directory or Path("runs", "mean-teacher-fast" if args.fast else "mean-teacher")
    seeds = range(args.seed, args.seed + (args.seeds or seeds))

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    images, held_out, labels, truth = train_test_split(images, labels, test_size=450, stratify=labels, random_state=0)
    test = {"image": held_out, "label": truth}
    engine = Engine(train_step, [Target(rate=0.01), Evaluate(eval_step, [test], when=every(steps // 20))])
    curves, correct = {arm: [] for arm in ARMS}, []

    print("seed  " + "  ".join(ARMS))
    for seed in seeds:
        labelled = labelled_subset(images, labels, seed)
        for arm, weight in ARMS.items():
            data = mixed_batches(labelled, images, seed)
            result = engine.run(new_state(seed, weight), data, steps=steps, rng=jax.random.key(seed))
            curves[arm].append(result.history["val/accuracy"])
            correct.append(np.asarray(predict(result.state, held_out) == truth))
        print(f"{seed:4}  " + "  ".join(f"{runs[-1][-1]:{len(arm)}.4f}" for arm, runs in curves.items()), flush=True)

    baseline, taught = (np.mean([run[-1] for run in runs]) for runs in curves.values())
    gain = taught - baseline
    directory.mkdir(parents=True, exist_ok=True)
    at_steps = result.history.steps("val/accuracy")
    draw(
        directory / "mean-teacher.png",
        labelled_subset(images, labels, seeds[0])["image"],
        held_out[correct[1] & ~correct[0]],
        curves,
        at_steps,
    )
    print(f"mean  {baseline:11.4f}  {taught:12.4f}")
    print(f"picture      {directory}/mean-teacher.png")
    print(f"improvement  {gain:.4f}" + ("" if gain >= target else f", below the target of {target}"))
    return int(not gain >= target)


if __name__ == "__main__":
    sys.exit(main())
