"""The callbacks that our projects share: `SkipSpikes`, and the list that every run starts with."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from onstep import Callback, Context, Loop, Record, Result
from onstep.callbacks import Checkpoint, GracefulExit, Progress, TensorBoard
from onstep.tools import has_training_metrics


class SkipSpikes(Callback):
    """Skips steps whose loss exceeds `mean + width * deviation`, for example because of a corrupt batch.

    The mean and the deviation are moving averages over the steps that were not skipped. The compiled half restores
    the state from before the step. The host half records the number of `skipped` steps with the training metrics,
    and stops the run if too many steps in a row were skipped, because then the cause is not a single batch. List it
    before callbacks that average the state.

    Args:
        width: threshold in standard deviations.
        decay: decay of the moving averages, in [0, 1).
        warmup: number of steps at the start that are skipped only if the loss is not finite.
        patience: number of skipped steps in a row that stop the run, checked when training metrics are recorded.
    """

    def __init__(self, *, width: float = 8, decay: float = 0.95, warmup: int = 20, patience: int = 20):
        self.width, self.decay, self.warmup, self.patience = width, decay, warmup, patience

    def init(self, state: Any) -> dict[str, Any]:
        return {"mean": 0.0, "square": 0.0, "kept": 0, "skipped": 0, "in_a_row": 0}

    def update(self, carry: dict[str, Any], ctx: Context) -> tuple[dict[str, Any], Context]:
        loss, mean, kept = ctx.metrics["loss"], carry["mean"], carry["kept"]
        deviation = jnp.sqrt(jnp.maximum(carry["square"] - mean**2, 0))
        normal = (loss <= mean + self.width * deviation) | ((kept < self.warmup) & jnp.isfinite(loss))
        decay = jnp.minimum(self.decay, kept / (kept + 1))  # a plain mean over the first steps
        carry = {
            "mean": jnp.where(normal, decay * mean + (1 - decay) * loss, mean),
            "square": jnp.where(normal, decay * carry["square"] + (1 - decay) * loss**2, carry["square"]),
            "kept": kept + normal,
            "skipped": carry["skipped"] + ~normal,
            "in_a_row": jnp.where(normal, 0, carry["in_a_row"] + 1),
        }
        return carry, ctx.replace(state=jax.tree.map(lambda a, b: jnp.where(normal, a, b), ctx.state, ctx.before))

    def on_log(self, loop: Loop, record: Record) -> None:
        if has_training_metrics(record):
            loop.log({"skipped": self.skipped(loop)})
            if int(loop.carry(self)["in_a_row"]) >= self.patience:
                loop.stop(f"the loss of the last {self.patience} steps was too high")

    def skipped(self, source: Loop | Result) -> int:
        """Return the number of steps skipped since the start of the run, over all sessions."""
        return int(source.carry(self)["skipped"])


def usual(directory: str | os.PathLike[str]) -> list[Callback]:
    """Return the callbacks that every run starts with; each project adds its own."""
    return [GracefulExit(), SkipSpikes(), Checkpoint(directory), TensorBoard(directory), Progress()]
