"""Train a GAN: two networks with two optimizers, updated alternately under one step counter.

    python examples/gan.py               generates digits, in under a minute on two CPU cores
    tensorboard --logdir runs/gan        shows the curves, and the samples as they improve

The step trains the discriminator. Less frequent updates are the compiled halves of callbacks, each
with its own cadence and compiled into the same call: the generator's update every 2 steps, and the
R1 penalty (Mescheder et al., 2018) every 8 steps, like the lazy regularization of StyleGAN2.
`loop.step` counts steps. Each optimizer counts its own updates, and its schedule follows that count.
Interrupt the script at any step and run it again: it resumes and ends in the same bytes.

The samples come from averaged weights. A classifier trained on the real digits scores them: the
Frechet distance between its features of samples and digits (300 at first, about 0.5 at the end), the
fraction of confident predictions (0.82), and the fraction of samples in the rarest class (0.08).
`runs/gan/gan.png` shows samples.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from matplotlib.figure import Figure
from onstep import Batches, Callback, Engine, at, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GracefulExit, Progress, TensorBoard
from onstep.callbacks.images import Images
from onstep.state import TrainState
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

BATCH, NOISE = 64, 32
GENERATOR_EVERY, PENALTY_EVERY, R1 = 2, 8, 0.1  # steps between updates; R1 is the weight of the penalty
LEAKY = partial(nn.leaky_relu, negative_slope=0.2)

GENERATOR = nn.Sequential(
    [nn.Dense(128), nn.LayerNorm(), nn.relu, nn.Dense(256), nn.LayerNorm(), nn.relu, nn.Dense(64), nn.sigmoid]
)
DISCRIMINATOR = nn.Sequential([nn.Dense(256), LEAKY, nn.Dense(128), LEAKY, nn.Dense(1)])


class State(struct.PyTreeNode):
    gen: TrainState
    disc: TrainState


def generate(gen, key, count):
    return gen.apply_fn(gen.params, jax.random.normal(key, (count, NOISE)))


def train_step(state, real, rng):
    disc, fake = state.disc, generate(state.gen, rng, BATCH)

    def loss_fn(params):
        return (nn.softplus(-disc.apply_fn(params, real)) + nn.softplus(disc.apply_fn(params, fake))).mean()

    loss, grads = jax.value_and_grad(loss_fn)(disc.params)
    return state.replace(disc=disc.apply_gradients(grads=grads)), {"disc_loss": loss}


class TrainGenerator(Callback):
    update_when = every(GENERATOR_EVERY)

    def update(self, carry, ctx):
        gen, disc = ctx.state.gen, ctx.state.disc

        def loss_fn(params):
            return nn.softplus(-disc.apply_fn(disc.params, generate(gen.replace(params=params), ctx.rng, BATCH))).mean()

        loss, grads = jax.value_and_grad(loss_fn)(gen.params)
        return carry, ctx.replace(state=ctx.state.replace(gen=gen.apply_gradients(grads=grads))).log(gen_loss=loss)


class Penalty(Callback):
    update_when = every(PENALTY_EVERY)

    def update(self, carry, ctx):
        disc = ctx.state.disc

        def loss_fn(params):
            slopes = jax.grad(lambda x: disc.apply_fn(params, x).sum())(ctx.batch)
            return PENALTY_EVERY * R1 / 2 * (slopes**2).sum(-1).mean()  # scaled to match a penalty at every step

        loss, grads = jax.value_and_grad(loss_fn)(disc.params)
        return carry, ctx.replace(state=ctx.state.replace(disc=disc.apply_gradients(grads=grads))).log(penalty=loss)


def new_state(key, steps):
    """Create both networks; each schedule is as long as the number of updates of its network."""

    def network(model, key, example, updates):
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, updates), b1=0.5)
        return TrainState.create(apply_fn=model.apply, params=model.init(key, example), tx=optimizer)

    gen_key, disc_key = jax.random.split(key)
    gen = network(GENERATOR, gen_key, jnp.zeros((1, NOISE)), steps // GENERATOR_EVERY)
    return State(gen, network(DISCRIMINATOR, disc_key, jnp.zeros((1, 64)), steps + steps // PENALTY_EVERY))


def fit_classifier(images, labels):
    """Fit a classifier to the digits; return a function from images to its last hidden layer and probabilities."""
    with threadpool_limits(1):  # many threads take ten times as long on a busy machine
        fitted = MLPClassifier((128, 32), random_state=0).fit(images, labels)

    def classify(x):
        for weights, biases in zip(fitted.coefs_, fitted.intercepts_, strict=True):
            features = nn.relu(x)
            x = features @ weights + biases
        return features, nn.softmax(x)

    return classify


def frechet(one, other):
    """Return the distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), jnp.cov(x, rowvar=False)) for x in (one, other))
    values, vectors = jnp.linalg.eigh(cov_1)
    root = vectors * jnp.sqrt(values.clip(0)) @ vectors.T
    cross = jnp.sqrt(jnp.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return ((mean_1 - mean_2) ** 2).sum() + jnp.trace(cov_1) + jnp.trace(cov_2) - 2 * cross


def tiles(images, scale):
    """Draw images dark on light, enlarged, with a frame around each."""
    framed = jnp.pad(1 - images.reshape(-1, 8, 8, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.8)
    return framed.repeat(scale, 1).repeat(scale, 2)


def draw(path, history, **images):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *left, right = figure.subplots(1, 3)
    for axes, (title, drawn) in zip(left, images.items(), strict=True):
        axes.imshow(tiles(drawn, 1).reshape(10, 10, 10, 10).swapaxes(1, 2).reshape(100, 100), cmap="gray")
        axes.set(title=title, xticks=[], yticks=[])
    right.semilogy(history.steps("val/frechet"), history["val/frechet"], ".-")
    right.set(title="distance of samples from real digits", xlabel="step", ylabel="Frechet distance")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, noise and data order; default: 0")
    parser.add_argument("--fast", action="store_true", help="2,000 steps instead of 10,000, in runs/gan-fast")
    parser.add_argument(
        "--directory", type=Path, help="directory of the run; delete it to start from scratch; default: runs/gan"
    )
    args = parser.parse_args()
    steps, target = (2_000, 8.0) if args.fast else (10_000, 1.0)
    directory = args.directory or Path("runs", "gan-fast" if args.fast else "gan")

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    classify = fit_classifier(images, labels)
    init_key, run_key, picture_key = jax.random.split(jax.random.key(args.seed), 3)

    def score(state, real, rng):
        features, probabilities = classify(generate(state.gen, rng, len(real)))
        rarest = jax.nn.one_hot(probabilities.argmax(-1), 10).mean(0).min()
        confident = (probabilities.max(-1) > 0.9).mean()
        return {"frechet": frechet(features, classify(real)[0]), "confident": confident, "rarest": rarest}

    def samples(state):
        return {"samples": tiles(generate(state.gen, picture_key, 100), 6)}

    ema, periodically = EMA(0.998, of="gen.params", warmup=9, when=GENERATOR_EVERY), every(steps // 20)
    callbacks = [
        GracefulExit(),
        TrainGenerator(),
        Penalty(),
        ema,
        Evaluate(score, [images], using=ema, when=at(1) | periodically),
        Images(samples, png=directory, events=directory, using=ema, when=periodically),
        Checkpoint(directory, when=periodically),
        TensorBoard(directory),
        Progress(),
    ]
    data = Batches(images, BATCH, seed=args.seed)
    result = Engine(train_step, callbacks, log_every=100).run(
        new_state(init_key, steps), data, steps=steps, rng=run_key
    )
    if result.history:  # empty if the run was already complete
        drawn = generate(ema.apply(result).gen, picture_key, 100)
        draw(
            directory / "gan.png",
            result.history,
            **{"real digits": images[:100], f"samples after {steps:,} steps": drawn},
        )

    distance, rarest = result.latest["val/frechet"], result.latest["val/rarest"]
    print(f"updates            {result.state.disc.step} of the discriminator, {result.state.gen.step} of the generator")
    print(f"pictures           gan.png and samples every {steps // 20} steps, in {directory}")
    print(f"rarest class       {rarest:.3f} of the samples" + (", below the target of 0.04" if rarest < 0.04 else ""))
    print(f"Frechet distance   {distance:.3f}" + (f", above the target of {target}" if distance > target else ""))
    return int(distance > target or rarest < 0.04)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
