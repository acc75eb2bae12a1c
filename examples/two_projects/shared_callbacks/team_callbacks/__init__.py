"""What our projects share: a callback of our own, and the list that every run begins with."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Callback, Context, Loop, Record, Result
from onstep.callbacks import Checkpoint, GracefulExit, Progress, TensorBoard


class SkipSpikes(Callback):
    """Undoes steps whose loss is not `<= mean + width * deviation`, as of a batch that went wrong.

    Mean and deviation are moving ones, of the steps that stand. The compiled half undoes; the host half
    records `skipped`, the steps undone so far, with the training metrics, and stops the run where
    too many in a row are: then it is not a batch that is wrong. List it before callbacks that
    keep averages of the state.

    Args:
        width: in standard deviations.
        decay: of the moving mean and deviation.
        warmup: steps that are not compared; one that is not finite is undone nevertheless.
        patience: steps undone in a row that stop the run, once training metrics are recorded.
    """

    def __init__(self, *, width: float = 8, decay: float = 0.95, warmup: int = 20, patience: int = 20):
        self.width, self.decay, self.warmup, self.patience = width, decay, warmup, patience

    def init(self, state: Any) -> dict[str, Any]:
        return {"mean": 0.0, "square": 0.0, "stand": 0, "skipped": 0, "in_a_row": 0}

    def update(self, carry: dict[str, Any], ctx: Context) -> tuple[dict[str, Any], Context]:
        loss, mean, stand = ctx.metrics["loss"], carry["mean"], carry["stand"]
        deviation = jnp.sqrt(jnp.maximum(carry["square"] - mean**2, 0))
        usual = (loss <= mean + self.width * deviation) | ((stand < self.warmup) & jnp.isfinite(loss))
        decay = jnp.minimum(self.decay, stand / (stand + 1))  # the plain mean at first
        carry = {
            "mean": jnp.where(usual, decay * mean + (1 - decay) * loss, mean),
            "square": jnp.where(usual, decay * carry["square"] + (1 - decay) * loss**2, carry["square"]),
            "stand": stand + usual,
            "skipped": carry["skipped"] + ~usual,
            "in_a_row": jnp.where(usual, 0, carry["in_a_row"] + 1),
        }
        return carry, ctx.replace(state=jax.tree.map(lambda a, b: jnp.where(usual, a, b), ctx.state, ctx.before))

    def on_log(self, loop: Loop, record: Record) -> None:
        if any(name.startswith("train/") for name in record.values):
            loop.log({"skipped": self.skipped(loop)})
            if int(loop.carry(self)["in_a_row"]) >= self.patience:
                loop.stop(f"the loss of the last {self.patience} steps was out of proportion")

    def skipped(self, source: Loop | Result) -> int:
        """The steps undone since the run first began."""
        return int(source.carry(self)["skipped"])


def usual(directory: str | os.PathLike[str]) -> list[Callback]:
    """The callbacks of every run of ours; a project adds its own."""
    return [GracefulExit(), SkipSpikes(), Checkpoint(directory), TensorBoard(directory), Progress()]
