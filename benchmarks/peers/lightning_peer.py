"""Lightning's Trainer, with manual optimization, around the jitted step.

Comparable: the step, its donation and the batches are the same as in the bare loop, and the
Trainer is in `barebones` mode, which disables every feature that costs speed. Not comparable:
Lightning is made for torch. The module has no parameters and no optimizer, and `self.log` is off in
this mode, so a callback reads the loss instead.
"""

import importlib.metadata
import logging
import warnings

import timing
from lightning.pytorch import Callback, LightningModule, Trainer


class Module(LightningModule):
    def __init__(self, step, state):
        super().__init__()
        self.automatic_optimization = False
        self.step, self.state = step, state

    def training_step(self, batch):
        self.state, metrics = self.step(self.state, batch)
        return {"metrics": metrics}

    def configure_optimizers(self):
        return None


class ReadLoss(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % timing.LOG_EVERY == 0:
            float(outputs["metrics"]["loss"])


def runner(*callbacks):
    def run(step, state, data):
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, callbacks=list(callbacks))
        trainer.fit(Module(step, state), data)

    return run


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cases = {"no callbacks": runner(), f"loss read every {timing.LOG_EVERY} steps": runner(ReadLoss())}
    timing.main("lightning", importlib.metadata.version("lightning"), lambda workload: cases)
