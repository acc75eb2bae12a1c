"""onstep: a callback-and-hooks engine for JAX training."""

from .cadence import Cadence, at, every
from .callback import Callback, Context
from .data.batches import Batches
from .engine import Engine
from .evaluate import evaluate
from .loop import Loop
from .records import History, Record, improves
from .result import Result
from .snapshot import Snapshot
from .steps import Steps
from .version import __version__ as __version__

__all__ = [
    "Batches",
    "Cadence",
    "Callback",
    "Context",
    "Engine",
    "History",
    "Loop",
    "Record",
    "Result",
    "Snapshot",
    "Steps",
    "at",
    "evaluate",
    "every",
    "improves",
]
