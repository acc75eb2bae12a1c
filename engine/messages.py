"""Texts for the user to read: messages to the log or to stderr, and what callbacks print."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from typing import TextIO

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
        print_text(f"onstep: {text}", sys.stderr)


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
    """Warn with the line of the user's code that called into onstep, rather than a line of onstep or JAX.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_user("a batch has another shape")
    >>> print(caught[0].message)
    a batch has another shape
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


_BETWEEN = ("onstep", "contextlib", "jax")
"""Packages whose frames stand between the user's code and a warning."""


def print_text(text: str, file: TextIO | None, *, end: str = "\n") -> None:
    r"""Print a text for the user to read, without ever ending a run.

    Characters that the file's encoding lacks are replaced. If nobody can read the file any more, as in
    `python train.py 2>&1 | head`, the text is dropped. After any other error, such as a full disk, it is dropped with
    a warning.

    Args:
        text: what to print.
        file: where to print it, such as `sys.stderr`, which is None in some GUI programs.
        end: printed after it.

    >>> import io
    >>> file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    >>> print_text("loss→ 0.5", file)
    >>> file.buffer.getvalue()
    b'loss? 0.5\n'
    """
    if file is None:
        return
    try:
        try:
            print(text, end=end, file=file, flush=True)
        except UnicodeEncodeError:
            encoding = getattr(file, "encoding", None) or "ascii"  # that of the error may be just "charmap"
            text = text.encode(encoding, "replace").decode(encoding)
            print(text, end=end, file=file, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        warn_user(f"A message could not be printed; the run continues: {error}.")
