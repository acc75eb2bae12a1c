"""Where the time of a run goes, without a line for it in the loop."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax

from .loop import Loop

COMPILE, CALL, WAIT, DATA, REST = "compiling", "calling the step", "waiting for the step", "data", "the loop"
"""The parts of a run beside those of its callbacks."""


class Stopwatch:
    """Tells where time goes: every moment counts for one part, the one that was begun last.

    Args:
        clock: gives the time in seconds.

    Attributes:
        seconds: by part, up to the last switch; they add up to the time since the watch was made.
    """

    def __init__(self, clock: Callable[[], float]):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._part, self._since = clock, REST, clock()

    def switch(self, part: str) -> str:
        """Begins a part; returns the one that this ends."""
        now, before = self._clock(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def read(self) -> dict[str, float]:
        """The seconds of each part until now."""
        self.switch(self._part)
        return dict(self.seconds)

    def recount(self, part: str, seconds: float) -> None:
        """Counts the last seconds for another part, as far as the present one had them."""
        now = self._clock()
        elapsed = now - self._since
        seconds = min(seconds, elapsed)
        self.seconds[self._part] += elapsed - seconds
        self.seconds[part] += seconds
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part of its own; what it interrupts goes on afterwards."""

        def call(*args: Any) -> Any:
            before = self.switch(part)
            try:
                return function(*args)
            finally:
                self.switch(before)

        return call


def follow(loop: Loop, watch: Stopwatch, first: Callable[..., None]) -> ExitStack:
    """Has a run timed, by wrapping what it calls; all is put back when the stack is closed.

    Parts are those above, `callback <name>` and, for on_save, `saving <name>`. Within a call of
    `feed.take` or `feed.blocks` the time before a batch is there counts as data, from there to
    the return of the compiled call as calling, and then, until the next is asked for, as waiting.

    Args:
        loop: the run, at on_load.
        watch: the stopwatch.
        first: called with (bundle, batch, rng) of the first step, once that is compiled.
    """
    undo, program, feed, switch = ExitStack(), loop._program, loop._feed, watch.switch

    def put(owner: Any, name: str, new: Any) -> None:
        if name in vars(owner):
            undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            undo.callback(delattr, owner, name)
        setattr(owner, name, new)

    def drawn(draw: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def items(*args: Any) -> Iterator[Any]:
            switch(DATA)
            try:
                for item in draw(*args):
                    switch(CALL)
                    yield item
                    switch(DATA)
            finally:
                switch(REST)

        return items

    def called(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(bundle: Any, batch: Any, rng: Any, due: Any) -> Any:
            try:
                return call(bundle, batch, rng, due)
            finally:
                switch(WAIT)

        return wrapped

    def prepared(prepare: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any) -> None:
            prepare(*args)
            first(*args)
            put(program, "call", called(program.call))  # not before: prepare may choose another, and looks into it

        return wrapped

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/") and threading.get_ident() == thread:
            watch.recount(COMPILE, duration_secs)

    for event, answers in loop._events.answers.items():
        for answer in answers:
            part = f"{'saving' if event == 'on_save' else 'callback'} {answer.name}"
            put(answer, "method", watch.timed(part, answer.method))
    for name in ("begin_epoch", "peek", "ended"):
        put(feed, name, watch.timed(DATA, getattr(feed, name)))
    for name in ("take", "blocks"):
        put(feed, name, drawn(getattr(feed, name)))
    put(loop._meter, "read", watch.timed(WAIT, loop._meter.read))
    put(program, "prepare", watch.timed(COMPILE, prepared(program.prepare)))
    thread = threading.get_ident()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    undo.callback(jax.monitoring.unregister_event_duration_listener, compiled)
    return undo
