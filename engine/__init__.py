"""onstep: a callback-and-hooks engine for JAX training."""

import importlib
import sys

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

_SUBMODULES = {
    *("callbacks", "config", "first_bad", "plan", "plots", "processes", "redact", "replay", "sharding", "state"),
    *("storage", "testing", "tools"),
}


def __getattr__(name: str) -> object:
    """Import a submodule when it is first used, so that `import onstep` is all that a script needs."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"onstep has no {name!r}", name=name, obj=sys.modules[__name__])


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
