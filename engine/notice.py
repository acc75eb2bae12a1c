"""One line to the person at the terminal."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("onstep")


def notice(text: str) -> None:
    """Says something worth knowing, such as that a run goes on at step 400.

    Through the logger `onstep` where INFO is enabled, else as a line on stderr. Silence it
    with `logging.getLogger("onstep").disabled = True`.
    """
    if log.isEnabledFor(logging.INFO):
        log.info(text)
    elif not log.disabled:
        print(f"onstep: {text}", file=sys.stderr)
