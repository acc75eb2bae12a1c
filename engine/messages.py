"""Messages to the person at the terminal."""

from __future__ import annotations

import logging
import sys

import jax

log: logging.Logger = logging.getLogger("onstep")

LONG = 5.0
"""Seconds beyond which a duration is shown to everybody."""


def log_user(text: str, *, everywhere: bool = False) -> None:
    """Tell the user something, such as that a run resumes from step 400.

    The message goes to the logger `onstep` if that has INFO enabled, else to stderr as one line. Silence it with
    `logging.getLogger("onstep").disabled = True`.

    Args:
        text: one line.
        everywhere: True shows it in every process; by default only process 0 does.

    >>> import contextlib
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...     log_user("resuming from step 400")
    onstep: resuming from step 400
    """
    if jax.process_index() and not everywhere:
        return
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif not log.disabled:
        print(f"onstep: {text}", file=sys.stderr)


def log_duration(what: str, seconds: float) -> None:
    """Tell how long something took: the user if it was long, else only the log."""
    text = f"{what} in {seconds:.3g} s"
    if seconds >= LONG:
        log_user(text)
    else:
        log.info(text)
