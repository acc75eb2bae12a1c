"""Messages for the user: one line each, to the log or to stderr."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings

import jax

log: logging.Logger = logging.getLogger("onstep")


def log_user(text: str, *, everywhere: bool = False) -> None:
    """Show the user a message, such as that a run resumes from step 400.

    The message goes to the logger `onstep` if that is enabled for INFO, and to stderr otherwise. Silence all messages
    with `logging.getLogger("onstep").disabled = True`.

    Args:
        text: one line, without a full stop.
        everywhere: True prints the message in every process, not only in process 0.

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
    """Tell the user how long something took if it took 5 seconds or more; otherwise only log it.

    >>> import contextlib
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...     log_duration("compiled the step", 12.34)
    onstep: compiled the step in 12.3 s
    """
    text = f"{what} in {seconds:.3g} s"
    if seconds >= 5:
        log_user(text)
    else:
        log.info(text)


def warn_user(text: str) -> None:
    """Warn the user with the line of their own code that called into onstep, not a line of the engine.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_user("a batch has another shape")
    >>> print(caught[0].message)
    a batch has another shape
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


_OURS = ("onstep", "contextlib")
"""Packages whose frames stand between the user's code and a warning."""
