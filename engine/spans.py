"""Spans: what a run is doing at any moment, for those who measure it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Span(NamedTuple):
    """One stretch of work between a `begin` and an `end`.

    Attributes:
        kind: `"compile"`, `"data"` (waiting for a batch), `"call"` (dispatching a compiled call), `"wait"`
            (waiting for the device), `"callback"` or `"save"` (a handler of `on_save`).
        callback: the name of the callback whose handler runs, else `""`.
        event: the event that it handles, else `""`.

    >>> Span("callback", "EMA", "on_step_end").kind
    'callback'
    """

    kind: str
    callback: str = ""
    event: str = ""


class Observer:
    """Watches what a run does between its events. Override what you need, and register it with `loop.observe`.

    Spans nest: a callback that reads a metric causes a `"wait"` within its `"callback"`. Every method is called
    in the thread of the run, so keep it short.

    >>> class Counter(Observer):
    ...     calls = 0
    ...     def begin(self, span):
    ...         self.calls += span.kind == "call"
    >>> counter = Counter()
    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}), steps_per_call=1)
    >>> @engine.on("run_begin")
    ... def observe(loop):
    ...     loop.observe(counter)
    >>> result = engine.run(jnp.int32(0), range(5), epochs=1)
    >>> counter.calls
    5
    """

    def begin(self, span: Span) -> None:
        """A span begins."""

    def end(self, span: Span) -> None:
        """The span that began last, and has not ended, ends."""

    def progress(self, name: str, done: int, total: int | None) -> None:
        """A callback reports progress: `done` of `total` units (None if unknown). 0 of them marks the beginning."""


COMPILE, DATA, CALL, WAIT = Span("compile"), Span("data"), Span("call"), Span("wait")


class Spans:
    """The observers of one run."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def __bool__(self) -> bool:
        return bool(self._observers)

    def add(self, observer: Observer) -> None:
        """Add an observer."""
        self._observers.append(observer)

    def progress(self, name: str, done: int, total: int | None) -> None:
        """Pass progress on to the observers."""
        for observer in self._observers:
            observer.progress(name, done, total)

    @contextlib.contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Report a `with` block as a span."""
        for observer in self._observers:
            observer.begin(span)
        try:
            yield
        finally:
            for observer in self._observers:
                observer.end(span)

    def wrap(self, span: Span, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with each call reported as a span."""

        def call(*args: Any) -> Any:
            with self.span(span):
                return function(*args)

        return call

    def iterate(self, span: Span, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, with the wait for each of them reported as a span."""
        advance = self.wrap(span, iter(items).__next__)
        while True:
            try:
                item = advance()
            except StopIteration:
                return
            yield item
