"""Events: their handlers, which of these are due, and the guarantee that every callback that began is ended."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .cadence import ALWAYS, Trigger, as_cadence
from .callback import BY_CADENCE, EVENTS, Callback, overridden
from .compiled.origin import KEPT_TRACER, TRACER_ERRORS
from .processes import ProcessGroup
from .spans import Span, Spans

if TYPE_CHECKING:
    from .callback import Loop


class Handler:
    """The method of one callback for one event.

    Attributes:
        event: the event.
        name: the name of the callback.
        method: the method.
        trigger: when it is due.
        called_at: the step at which it was last called, -1 if never.
        running: the names of the callbacks whose handlers are running, the innermost last; shared by all handlers.
    """

    def __init__(self, event: str, name: str, method: Callable[..., None], trigger: Trigger, running: list[str]):
        self.running: list[str] = running
        self.event: str = event
        self.name: str = name
        self.method: Callable[..., None] = method
        self.trigger: Trigger = trigger
        self.called_at: int = -1

    def call(self, loop: Loop, *args: Any) -> None:
        """Call the method. An error gets a note that says where it was raised."""
        self.called_at = loop.step
        self.running.append(self.name)
        try:
            self.method(loop, *args)
        except BaseException as error:
            error.add_note(f"onstep: raised by {self.name}.{self.event} at step {loop.step}")
            note_kept(error)
            raise
        finally:
            self.running.pop()


class Events:
    """The handlers of each event, in the order of the callbacks.

    Args:
        callbacks: by name.
        group: the processes of the run; its clock governs cadences in seconds.

    Attributes:
        handlers: by event.
        running: the names of the callbacks whose handlers are running, the innermost last.
    """

    def __init__(self, callbacks: dict[str, Callback], group: ProcessGroup):
        self.handlers: dict[str, list[Handler]] = {event: [] for event in EVENTS}
        self.running: list[str] = []
        for name, callback in callbacks.items():
            when = as_cadence(callback.when, f"{name}.when")
            for event, handlers in self.handlers.items():
                if method := overridden(callback, event):
                    trigger = Trigger(when if event in BY_CADENCE else ALWAYS, group.clock)
                    handlers.append(Handler(event, name, method, trigger, self.running))
        self._group = group
        self._names = list(callbacks)
        self._begun: set[str] = set()  # callbacks whose on_run_end is guaranteed
        self._before = [handler.trigger for handler in self.handlers["on_step_begin"]]
        self._after = [handler.trigger for event in ("on_step_end", "on_save") for handler in self.handlers[event]]
        self._timed = [trigger for trigger in self._before + self._after if trigger.cadence.seconds]

    def observe(self, spans: Spans) -> None:
        """Report every handler as a span from now on."""
        for event, handlers in self.handlers.items():
            for handler in handlers:
                span = Span("save" if event == "on_save" else "callback", handler.name, event)
                handler.method = spans.wrap(span, handler.method)

    def fire(self, event: str, loop: Loop, *args: Any) -> None:
        """Call every handler of an event."""
        for handler in self.handlers[event]:
            handler.call(loop, *args)

    def take_due(self, event: str, step: int, epoch: int = 0) -> list[Handler]:
        """Return the handlers that are due at `step`, and advance them.

        Args:
            event: the event.
            step: the step.
            epoch: the epoch that it completes, 0 if it completes none.
        """
        handlers = self.handlers[event]
        return [handler for handler in handlers if handler.trigger.fires(step, epoch)] if handlers else []

    def next(self, step: int, end: float) -> float:
        """Return the next step after `step` at which a handler may be due, in an epoch that ends at `end`."""
        until = math.inf
        for trigger in self._after:
            if trigger.next_step < until:
                until = trigger.next_step
        for trigger in self._before:
            before = (min(trigger.next_step, end) if trigger.cadence.epochs else trigger.next_step) - 1
            if step < before < until:
                until = before
        return until

    def deadline(self) -> float:
        """Return the next time at which a handler is due by the clock."""
        return min([trigger.deadline for trigger in self._timed]) if self._timed else math.inf

    @contextlib.contextmanager
    def ensure_end(self, loop: Loop) -> Iterator[None]:
        """Guarantee the end of a run: `on_exception` if it fails, and `on_run_end` for every callback that began."""
        try:
            yield
        except BaseException as error:
            loop.error = error
            self._group.fail(error, loop.step)
            self._handle(error, loop)
            raise
        finally:
            try:
                self._end(loop)
            finally:
                loop.error = None  # its traceback holds the loop, and so every array

    def load(self, loop: Loop) -> None:
        """Call the handlers of `on_load`."""
        for handler in self.handlers["on_load"]:
            self._begun.add(handler.name)
            handler.call(loop)

    def begin(self, loop: Loop) -> None:
        """Call the handlers of `on_run_begin`. Cadences start at the loop's step."""
        for handlers in self.handlers.values():
            for handler in handlers:
                handler.trigger.start(loop.step)
        begins = {handler.name: handler for handler in self.handlers["on_run_begin"]}
        for name in self._names:
            self._begun.add(name)
            if name in begins:
                begins[name].call(loop)

    def _handle(self, error: BaseException, loop: Loop) -> None:
        """Call the handlers of `on_exception`; an error that one of them raises is added to it as a note."""
        for handler in self.handlers["on_exception"]:
            if handler.name in self._begun:
                try:
                    handler.call(loop, error)
                except BaseException as another:
                    _add_note(error, another)

    def _end(self, loop: Loop) -> None:
        """Call the handlers of `on_run_end` in reverse order.

        If the run failed, its error is the one that is raised. Otherwise it is the first error of these handlers,
        but a real error wins over KeyboardInterrupt or SystemExit. All others are added to it as notes.
        """
        before, errors = loop.error, []
        for handler in reversed(self.handlers["on_run_end"]):
            if handler.name in self._begun:
                try:
                    handler.call(loop)
                except BaseException as error:
                    errors.append(error)
                    loop.error = loop.error or error
        failures = [error for error in errors if isinstance(error, Exception)]
        first = before or next(iter(failures + errors), None)
        for error in errors:
            if error is not first and first is not None:
                _add_note(first, error)
        if before is None and first is not None:
            raise first


def note_kept(error: BaseException) -> None:
    """Add what to do to an error about an array that was kept from a step, or that belongs to the data."""
    if "been deleted" in str(error) and isinstance(error, (RuntimeError, ValueError)):
        error.add_note(
            "onstep: an array kept from an earlier step has since been donated to the compiled call. "
            "Keep a copy instead: jax.tree.map(jnp.copy, loop.state)."
        )
    elif isinstance(error, ValueError) and "read-only" in str(error):
        error.add_note(
            "onstep: the arrays of loop.batch cannot be changed in place. Assign another batch, such as "
            'loop.batch = {**loop.batch, "x": x}, or a copy that you have changed.'
        )
    elif isinstance(error, TRACER_ERRORS):
        error.add_note(f"onstep: {KEPT_TRACER}")


def _add_note(error: BaseException, another: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(another, "__notes__", []))
    error.add_note(f"onstep: {type(another).__name__} was also raised: {another}{notes}")
