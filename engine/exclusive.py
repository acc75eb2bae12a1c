"""Exclusive use of objects that two runs cannot share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_in_use: dict[int, Any] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def exclusive(objects: dict[str, Any]) -> Iterator[None]:
    """Reserve objects for one run; raise if another run in this process is using one of them.

    An engine's compiled step and its callbacks keep state while a run lasts. A second run of the same engine, started
    inside a callback or in another thread, would silently mix its numbers with those of the first.

    Args:
        objects: by the name that the error shows.

    Raises:
        RuntimeError: one of them is in use.

    >>> with exclusive({"EMA": object}), exclusive({"EMA": object}):
    ...     pass
    Traceback (most recent call last):
    ...
    RuntimeError: EMA is in use by a run that has not ended. ...
    """
    with _lock:
        for name, item in objects.items():
            if id(item) in _in_use:
                raise RuntimeError(
                    f"{name} is in use by a run that has not ended. For a run inside a callback, a "
                    "`for` body or another thread, make another Engine with callbacks of its own."
                )
        _in_use.update({id(item): item for item in objects.values()})
    try:
        yield
    finally:
        with _lock:
            for item in objects.values():
                del _in_use[id(item)]
