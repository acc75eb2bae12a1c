"""tunix's PeftTrainer: around the jitted step, and with the nnx step that it builds.

Comparable: in the first case the step, its donation and the batches are the same as in the bare
loop. In the second case the layers, the loss and the optimizer are the same, but tunix builds the step:
it uses nnx and also computes the gradient norm. Not comparable: the trainer reads and keeps the loss
after every step, and has no option to do so only every 100 steps.
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
    """A trainer that runs a given step."""

    step, state = None, None

    def create_train_step_fn(self):
        def train_step(batch):
            self.state, metrics = self.step(self.state, batch)
            return metrics["loss"], None, 0.0  # the third is the gradient norm, here a Python float

        return train_step


def build(cls, workload):
    tx = optax.adam(1e-3) if workload == "W3" else optax.sgd(0.1)
    trainer = cls(MLP(WIDTHS[workload]), tx, TrainingConfig(eval_every_n_steps=10**9))
    trainer.is_managed_externally = True  # otherwise a second `train` skips as many batches as the first one used
    return trainer


def cases(workload):
    around, own = build(Around, workload), build(PeftTrainer, workload).with_loss_fn(loss)

    def around_step(step, state, data):
        around.step, around.state = step, state
        around.train(data, skip_jit=True)

    runs = {"loss read every step": around_step}
    if workload != "no-op":
        runs["loss read every step, tunix's own step"] = lambda step, state, data: own.train(data)
    return runs


if __name__ == "__main__":
    timing.main("tunix", importlib.metadata.version("google-tunix"), cases)
