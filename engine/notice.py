"""One line to the person at the terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from .loop import Loop

log: logging.Logger = logging.getLogger("onstep")


def notice(text: str, *, everywhere: bool = False) -> None:
    """Says something worth knowing, such as that a run goes on at step 400.

    Through the logger `onstep` where INFO is enabled, else as a line on stderr. Silence it
    with `logging.getLogger("onstep").disabled = True`. Of several processes process 0 says it, unless
    `everywhere`.
    """
    if jax.process_index() and not everywhere:
        return
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif not log.disabled:
        print(f"onstep: {text}", file=sys.stderr)


def announce(what: str, seconds: float) -> None:
    """Says how long something took: to everybody if that was long, else to the log alone."""
    said = f"{what} in {seconds:.3g} s"
    if seconds >= 5:
        notice(said)
    else:
        log.info(said)


def standing(loop: Loop) -> str:
    """Where a run that goes on stands, and whether anything is left to do."""
    if loop.stopped is not None:
        return f"the run was stopped for good at step {loop.step} ({loop.stopped}): nothing to do"
    epoch = f"epoch {loop.epoch} of {loop.epochs}" if loop.epochs is not None else f"epoch {loop.epoch}"
    step = f"step {loop.step} of {loop.steps}" if loop.steps is not None else f"step {loop.step}"
    return f"already at {step}, {epoch}: nothing to do" if loop.over else f"going on after {step}, {epoch}"
