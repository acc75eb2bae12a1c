"""Spans: what a run does at any moment, reported to observers that measure it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Span(NamedTuple):
    """One stretch of work, from an observer's `begin` to its `end`.

    Attributes:
        kind: `"compile"`, `"data"` (waiting for a batch), `"call"` (dispatching a compiled call), `"wait"`
            (waiting for the device), `"callback"` or `"save"` (a handler of `on_save`).
        callback: the name of the callback whose handler runs, otherwise `""`.
        event: the event that it handles, otherwise `""`.

    >>> from onstep import Engine
    >>> class PrintSpans(Observer):
    ...     def begin(self, span):
    ...         if span.kind == "callback":
    ...             print(span)
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> @engine.on("run_begin")
    ... def observe(loop):
    ...     loop.observe(PrintSpans())
    >>> @engine.on("step_end")
    ... def print_step(loop):
    ...     print("step", loop.step)
    >>> result = engine.run(0, [1], epochs=1)
    Span(kind='callback', callback='print_step', event='on_step_end')
    step 1
    """

    kind: str
    callback: str = ""
    event: str = ""


class Observer:
    """Watches what a run does between its events. Override the methods you need, and register it with `loop.observe`.

    Spans nest: a callback that reads a metric causes a `"wait"` inside its `"callback"`. Every method is called
    in the thread of the run, so keep it short. An observer that overrides only `progress` costs the steps nothing;
    one that overrides `begin` or `end` is called at every span, which is noticeable for short steps.

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
        """The innermost open span ends. Every `end` belongs to a `begin` that the same observer received."""

    def progress(self, name: str, done: int, total: int | None) -> None:
        """A callback reports progress: `done` of `total` units (None if unknown). `done=0` marks the beginning."""

    def close(self) -> None:
        """The run is over, and every `on_run_end` has returned or raised."""


COMPILE, DATA, CALL, WAIT = Span("compile"), Span("data"), Span("call"), Span("wait")


class Spans:
    """The observers of one run.

    Attributes:
        timed: whether an observer overrides `begin` or `end`. Only then does the loop wrap its handlers and calls,
            so a run without such an observer runs exactly the code that it would run without spans.

    >>> spans = Spans()
    >>> spans.add(Observer())
    >>> spans.timed
    False
    """

    def __init__(self) -> None:
        self._observers: tuple[Observer, ...] = ()
        self._timers: tuple[Observer, ...] = ()  # those that override `begin` or `end`
        self._undo = contextlib.ExitStack()
        self.timed: bool = False

    def add(self, observer: Observer) -> None:
        """Add an observer."""
        self._observers += (observer,)
        self._undo.callback(observer.close)
        if any(_overrides(observer, name) for name in ("begin", "end")):
            self._timers += (observer,)
            self.timed = True

    def close(self) -> None:
        """Restore the methods that `instrument` replaced, and close the observers, the newest first."""
        self._observers = self._timers = ()
        self.timed = False
        self._undo.close()

    def progress(self, name: str, done: int, total: int | None) -> None:
        """Pass progress on to the observers."""
        for observer in self._observers:
            observer.progress(name, done, total)

    @contextlib.contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Report a `with` block as a span."""
        timers = self._timers  # an observer that is added inside the block does not see its end
        for timer in timers:
            timer.begin(span)
        try:
            yield
        finally:
            for timer in timers:
                timer.end(span)

    def wrap(self, span: Span, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with each call reported as a span."""

        def call(*args: Any) -> Any:  # `with self.span(span): ...` spelled out, which saves about a microsecond
            timers = self._timers
            for timer in timers:
                timer.begin(span)
            try:
                return function(*args)
            finally:
                for timer in timers:
                    timer.end(span)

        return call

    def instrument(self, owner: Any, span: Span, *names: str) -> None:
        """Report every call of some methods of an object as a span, until `close`."""
        for name in names:
            setattr(owner, name, self.wrap(span, getattr(owner, name)))
            self._undo.callback(delattr, owner, name)

    def iterate(self, span: Span, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, with the wait for each of them reported as a span."""
        advance = self.wrap(span, iter(items).__next__)
        while True:
            try:
                item = advance()
            except StopIteration:
                return
            yield item


def _overrides(observer: Observer, name: str) -> bool:
    return getattr(getattr(observer, name), "__func__", None) is not getattr(Observer, name)
