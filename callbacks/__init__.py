"""The built-in callbacks, one per file. None of them imports another."""

from .checkpoint import Checkpoint
from .clip_weights import ClipWeights
from .csv_file import CSV
from .early_stopping import EarlyStopping
from .ema import EMA
from .evaluate import Evaluate
from .fingerprint import Fingerprint
from .graceful_exit import GracefulExit
from .grad_norm import GradNorm
from .histograms import Histograms
from .images import Images
from .json_lines import JSONLines
from .learning_rate import LearningRate
from .mlflow_run import MLflow
from .nan_guard import NaNGuard
from .profiler import Profiler
from .progress import Progress
from .repeat_step import RepeatStep
from .report import Report
from .scalars import Scalars
from .summary import Summary
from .swa import SWA
from .table import Table
from .target import Target
from .tensorboard import TensorBoard
from .timing import Timing
from .wandb_run import WandB
from .writer import Writer

__all__ = [
    "CSV",
    "EMA",
    "SWA",
    "Checkpoint",
    "ClipWeights",
    "EarlyStopping",
    "Evaluate",
    "Fingerprint",
    "GracefulExit",
    "GradNorm",
    "Histograms",
    "Images",
    "JSONLines",
    "LearningRate",
    "MLflow",
    "NaNGuard",
    "Profiler",
    "Progress",
    "RepeatStep",
    "Report",
    "Scalars",
    "Summary",
    "Table",
    "Target",
    "TensorBoard",
    "Timing",
    "WandB",
    "Writer",
]
