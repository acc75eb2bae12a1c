"""The callbacks that come with onstep: one file each, none needs another."""

from .checkpoint import Checkpoint
from .clip_weights import ClipWeights
from .early_stopping import EarlyStopping
from .ema import EMA
from .evaluate import Evaluate
from .graceful_exit import GracefulExit
from .grad_norm import GradNorm
from .histograms import Histograms
from .images import Images
from .learning_rate import LearningRate
from .nan_guard import NaNGuard
from .profiler import Profiler
from .progress import Progress
from .scalars import Scalars
from .summary import Summary
from .swa import SWA
from .target import Target
from .tensorboard import TensorBoard
from .timing import Timing

__all__ = [
    "EMA",
    "SWA",
    "Checkpoint",
    "ClipWeights",
    "EarlyStopping",
    "Evaluate",
    "GracefulExit",
    "GradNorm",
    "Histograms",
    "Images",
    "LearningRate",
    "NaNGuard",
    "Profiler",
    "Progress",
    "Scalars",
    "Summary",
    "Target",
    "TensorBoard",
    "Timing",
]
