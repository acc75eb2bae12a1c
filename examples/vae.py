"""Train a variational autoencoder from a YAML configuration, keep the best model and load it at the end.

    python examples/vae.py                     trains the model of examples/vae.yaml, in under a minute
    python examples/vae.py --config my.yaml    trains another one; a wrong field is rejected by name
    tensorboard --logdir runs/vae              shows the curves, and the pictures as they improve

A pixel of these digits is a count from 0 to 16, so the decoder's likelihood is binomial. The loss is
the negative ELBO in nats per image. On held-out digits it ends at 91 nats, 22 of which are the KL
divergence; a model of independent pixels without latent variables needs 254. `vae.png`,
`schedule.png` and the configuration are saved in the directory of the checkpoints.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.scipy.special import gammaln
from matplotlib.figure import Figure
from onstep import Batches, Engine, evaluate, every
from onstep.callbacks import Checkpoint, EarlyStopping, Evaluate, GracefulExit, GradNorm, Progress, TensorBoard
from onstep.callbacks.images import Images
from onstep.callbacks.learning_rate import LearningRate
from onstep.config import Name, TrainingConfig, Whole, plot
from onstep.state import TrainState
from onstep.storage import load
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Config(TrainingConfig):
    """The fields of every run, of which some are required or unused here, and the fields of this model."""

    directory: Name
    metric: Name
    patience: Whole
    ema_decay: None = None
    latent: Whole
    hidden: Whole


class VAE(nn.Module):
    latent: int
    hidden: int

    def setup(self):
        def layers(features):
            return nn.Sequential([nn.Dense(self.hidden), nn.relu, nn.Dense(self.hidden), nn.relu, nn.Dense(features)])

        self.encoder, self.decoder = layers(2 * self.latent), layers(64)

    def __call__(self, images, key):
        mean, log_var = jnp.split(self.encoder(images / 16), 2, axis=-1)
        z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
        return self.decoder(z), mean, log_var

    def decode(self, z):
        return nn.sigmoid(self.decoder(z))


def binomial(logits, counts):
    """Return the negative log-likelihood of counts from 0 to 16, summed over the pixels."""
    ways = gammaln(17) - gammaln(counts + 1) - gammaln(17 - counts)
    return (16 * optax.sigmoid_binary_cross_entropy(logits, counts / 16) - ways).sum(-1).mean()


def measure(params, state, images, key):
    logits, mean, log_var = state.apply_fn({"params": params}, images, key)
    reconstruction = binomial(logits, images)
    kl = 0.5 * (mean**2 + jnp.exp(log_var) - 1 - log_var).sum(-1).mean()
    return reconstruction + kl, {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}


def train_step(state, images, rng):
    grads, metrics = jax.grad(measure, has_aux=True)(state.params, state, images, rng)
    return state.apply_gradients(grads=grads), metrics, {"grads": grads}


def eval_step(state, images):
    return measure(state.params, state, images, jax.random.key(0))[1]  # the same noise at every evaluation


def pictures(state, images):
    """Draw samples, and images above their reconstructions."""
    variables = {"params": state.params}
    latent = state.apply_fn(variables, images, jax.random.key(0))[1]
    reconstructed = state.apply_fn(variables, latent, method="decode")
    drawn = state.apply_fn(variables, jax.random.normal(jax.random.key(1), (100, latent.shape[1])), method="decode")
    pairs = jnp.stack([images.reshape(-1, 10, 64) / 16, reconstructed.reshape(-1, 10, 64)], axis=1)
    return {"samples": tiles(drawn), "reconstructions": tiles(pairs)}


def tiles(images):
    """Draw images dark on light, each pixel as 6 x 6, with a frame around each."""
    large = (1 - images.reshape(-1, 8, 8, 1)).repeat(6, 1).repeat(6, 2)
    return jnp.pad(large, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=0.8)


def draw(path, best, history, pictures):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *left, right = figure.subplots(1, 3)
    titles = "samples", "held-out digits, each above its reconstruction"
    for axes, title, drawn in zip(left, titles, pictures.values(), strict=True):
        side = 10 * drawn.shape[1]
        grid = drawn.reshape(10, 10, *drawn.shape[1:3]).swapaxes(1, 2).reshape(side, side)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])
    for number, name in enumerate(("loss", "reconstruction", "kl")):
        right.plot(history.steps(f"val/{name}"), history[f"val/{name}"], f"C{number}", label=f"{name}, held out")
        right.plot(history.steps(f"epoch/{name}"), history[f"epoch/{name}"], f"C{number}:")
    right.plot([], "k:", label="the same, training")
    right.axvline(best, color="0.6", linewidth=1, label=f"best model, step {best:,}")
    right.set(title="negative ELBO and its two parts", xlabel="step", ylabel="nats per image", ylim=(0, 200))
    right.legend()
    figure.savefig(path, dpi=120)


def parse_config():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("vae.yaml"), help="default: vae.yaml")
    parser.add_argument("--seed", type=int, help="overrides the configuration's seed")
    parser.add_argument("--directory", help="overrides the configuration's directory; delete it to start from scratch")
    parser.add_argument("--fast", action="store_true", help="the first 40 epochs, in runs/vae-fast")
    args = parser.parse_args()
    fast = {"epochs": 40, "directory": "runs/vae-fast"} if args.fast else {}
    overrides = {name: value for name in ("seed", "directory") if (value := getattr(args, name)) is not None}
    try:
        config = Config(**{**dict(Config.from_yaml(args.config)), **fast, **overrides})
    except ValueError as error:
        parser.error(f"in {args.config} or in an argument: {error}")
    return config, 102 if args.fast else 93


def main():
    config, target = parse_config()
    directory = Path(config.directory)
    images = load_digits().data.astype(np.float32)
    train, held_out = train_test_split(images, test_size=0.2, random_state=0)
    optimizer, schedule = config.build()
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    model = VAE(config.latent, config.hidden)
    state = TrainState.create(apply_fn=model.apply, tx=optimizer, **model.init(init_key, train[:1], init_key))

    callbacks = [
        GracefulExit(),
        GradNorm(),
        LearningRate(schedule),
        Evaluate(eval_step, [held_out], when=config.eval_every or every(epochs=1)),
        EarlyStopping(config.metric, patience=config.patience, mode=config.mode, min_delta=config.min_delta),
        Images(lambda s: pictures(s, held_out[:50]), png=directory, events=directory, when=every(epochs=20)),
        Checkpoint(
            directory, when=config.save_every or every(epochs=1), keep=config.keep, best=config.metric, mode=config.mode
        ),
        TensorBoard(directory),
        Progress(),
    ]
    engine = Engine(train_step, callbacks, log_every=config.log_every)
    data = Batches(train, config.batch_size, seed=config.seed)
    result = engine.run(state, data, epochs=config.epochs, steps=config.steps, rng=run_key)

    best_state = load(directory, like=result.state, step="best")
    step, loss = int(best_state.step), evaluate(eval_step, best_state, [held_out])["loss"]
    if result.history:  # empty if the run was already complete
        config.to_yaml(directory / "config.yaml")
        plot(schedule, result.step, directory / "schedule.png")
        draw(directory / "vae.png", step, result.history, pictures(best_state, held_out[:50]))

    mean = train.mean(0).clip(0.01, 15.99)
    print(f"pictures       vae.png, schedule.png and samples every 20 epochs, in {directory}")
    print(f"without latent variables  {binomial(jnp.log(mean / (16 - mean)), held_out):.2f} nats")
    print(f"final model, step {result.step:<7} {result.latest['val/loss']:.2f} nats")
    print(f"best model, step {step:<8} {loss:.2f} nats" + ("" if loss < target else f", above the target of {target}"))
    return int(not loss < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
