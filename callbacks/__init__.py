"""The callbacks that come with onstep: one file each, none needs another."""

from .checkpoint import Checkpoint
from .early_stopping import EarlyStopping
from .ema import EMA
from .evaluate import Evaluate
from .grad_norm import GradNorm
from .progress import Progress
from .tensorboard import TensorBoard

__all__ = ["EMA", "Checkpoint", "EarlyStopping", "Evaluate", "GradNorm", "Progress", "TensorBoard"]
