"""Ctrl-C between two compiled calls, never while a call holds the only copy of the state."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

WAITS = ("onstep.data.", "onstep.compiled.throttle")
"""Modules that wait outside a call, for a batch or for the device. A wait is interrupted at once."""


@contextlib.contextmanager
def deferred_interrupts(calls: CodeType, defer: Callable[[], bool]) -> Iterator[None]:
    """Delay a KeyboardInterrupt that arrives during a compiled call until the call has returned.

    A call consumes the state and returns a new one. Python raises a KeyboardInterrupt after the call and before its
    results are assigned, so the run would lose both the old state and the new one. Nothing changes outside the main
    thread, or if there is another signal handler.

    Args:
        calls: the code of the function that makes the calls.
        defer: asks that function to raise the KeyboardInterrupt between two calls; returns False if it had already been
            asked.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        waits, where = False, frame
        while where is not None and where.f_code is not calls:
            waits = waits or where.f_globals.get("__name__", "").startswith(WAITS)
            where = where.f_back
        if where is None or waits or not defer():
            signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is receive:
            signal.signal(signal.SIGINT, signal.default_int_handler)
