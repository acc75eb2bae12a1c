"""The callbacks that come with onstep: one file each, none needs another."""

from .checkpoint import Checkpoint
from .early_stopping import EarlyStopping
from .ema import EMA
from .evaluate import Evaluate
from .graceful_exit import GracefulExit
from .grad_norm import GradNorm
from .nan_guard import NaNGuard
from .progress import Progress
from .tensorboard import TensorBoard

__all__ = [
    "EMA",
    "Checkpoint",
    "EarlyStopping",
    "Evaluate",
    "GracefulExit",
    "GradNorm",
    "NaNGuard",
    "Progress",
    "TensorBoard",
]
