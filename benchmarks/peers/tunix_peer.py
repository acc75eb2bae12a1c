"""tunix's PeftTrainer: around the jitted step, and with the nnx step it makes itself.

Comparable: in the first case the step, its donation and the batches are those of the bare loop.
In the second the layers, the loss and the optimizer are, but the step is tunix's own: it goes
through nnx and computes the norm of the gradients too. Not comparable: the trainer reads the loss
after every step and keeps it; there is no way to have it do so every 100 steps only.
"""

import importlib.metadata
import itertools

import jax
import optax
import timing
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

WIDTHS = {"no-op": [64, 10], "W1": [64, 10], "W3": [64, 256, 256, 256, 10]}


class MLP(nnx.Module):
    def __init__(self, widths):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


class Around(PeftTrainer):
    """A trainer whose step is the one given."""

    step, state = None, None

    def create_train_step_fn(self):
        def train_step(batch):
            self.state, metrics = self.step(self.state, batch)
            return metrics["loss"], None, 0.0  # the third is the gradients' norm, on the host here

        return train_step


def made(cls, workload):
    tx = optax.adam(1e-3) if workload == "W3" else optax.sgd(0.1)
    trainer = cls(MLP(WIDTHS[workload]), tx, TrainingConfig(eval_every_n_steps=10**9))
    trainer.is_managed_externally = True  # otherwise a second `train` leaves out as many batches as the first took
    return trainer


def cases(workload):
    around, own = made(Around, workload), made(PeftTrainer, workload).with_loss_fn(loss)

    def around_step(step, state, data):
        around.step, around.state = step, state
        around.train(data, skip_jit=True)

    runs = {"loss read every step": around_step}
    if workload != "no-op":
        runs["loss read every step, tunix's own step"] = lambda step, state, data: own.train(data)
    return runs


if __name__ == "__main__":
    timing.main("tunix", importlib.metadata.version("google-tunix"), cases)
