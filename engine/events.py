"""Which methods answer which event, and which of them are due."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .cadence import ALWAYS, Cadence, as_cadence
from .callback import EVENTS, Callback, own
from .spans import Span, Spans

if TYPE_CHECKING:
    from .loop import Loop

BY_CADENCE = ("on_step_begin", "on_step_end", "on_save")
"""The events that `when` governs; the others reach everybody who answers them."""


class Due:
    """A cadence followed through a run: keeps the next due step, so that asking is cheap.

    Attributes:
        next: the next step that is due by its number.
        deadline: the time, in seconds of the clock, at which it is due by that alone.
    """

    def __init__(self, cadence: Cadence, clock: Callable[[], float], step: int = 0):
        self.cadence: Cadence = cadence
        self._clock = clock
        self._interval = min(cadence.seconds, default=math.inf)
        self._by_step_alone = not (cadence.epochs or cadence.seconds)
        self.start(step)

    def start(self, step: int) -> None:
        """Begins with `step` steps completed."""
        self.next: float = self.cadence.next(step)
        self.deadline: float = self._clock() + self._interval if self.cadence.seconds else math.inf

    def now(self, step: int, epoch: int = 0) -> bool:
        """Whether it is due at `step`, which completes `epoch` (0 if it completes none)."""
        due = step >= self.next
        if due:
            self.next = self.cadence.next(step)
        if self._by_step_alone:
            return due
        late = self.deadline < math.inf and self._clock() >= self.deadline
        due = due or late or self.cadence.due(step, epoch=epoch)
        if due and self.deadline < math.inf:
            self.deadline = self._clock() + self._interval
        return due


class Answer:
    """One callback's method for one event, with the time at which it is due."""

    def __init__(self, event: str, name: str, method: Callable[..., None], due: Due):
        self.event: str = event
        self.name: str = name
        self.method: Callable[..., None] = method
        self.due: Due = due
        self.called_at: int = -1  # the step at which it was last called

    def call(self, loop: Loop, *args: Any) -> None:
        """Calls the method; an error carries a note that says where it came from."""
        self.called_at = loop.step
        try:
            self.method(loop, *args)
        except BaseException as error:
            error.add_note(f"onstep: raised by {self.name}.{self.event} at step {loop.step}")
            if "been deleted" in str(error) and isinstance(error, (RuntimeError, ValueError)):
                error.add_note(
                    "onstep: an array kept from an earlier step was donated to the compiled call since. "
                    "Keep a copy instead: jax.tree.map(jnp.copy, loop.state)."
                )
            raise


class Events:
    """The methods that answer each event, in the order of the callbacks.

    Args:
        callbacks: by name.
        clock: gives the time in seconds.
    """

    def __init__(self, callbacks: dict[str, Callback], clock: Callable[[], float]):
        self.answers: dict[str, list[Answer]] = {event: [] for event in EVENTS}
        for name, callback in callbacks.items():
            when = as_cadence(callback.when, f"{name}.when")
            for event, answers in self.answers.items():
                if method := own(callback, event):
                    due = Due(when if event in BY_CADENCE else ALWAYS, clock)
                    answers.append(Answer(event, name, method, due))
        self._names = list(callbacks)
        self._owed: set[str] = set()  # whose on_run_end must come
        self._before = [answer.due for answer in self.answers["on_step_begin"]]
        self._after = [answer.due for event in ("on_step_end", "on_save") for answer in self.answers[event]]
        self._timed = [due for due in self._before + self._after if due.cadence.seconds]

    def observe(self, spans: Spans) -> None:
        """Report every handler as a span from now on."""
        for event, answers in self.answers.items():
            for answer in answers:
                span = Span("save" if event == "on_save" else "callback", answer.name, event)
                answer.method = spans.wrap(span, answer.method)

    def fire(self, event: str, loop: Loop, *args: Any) -> None:
        """Calls everybody who answers the event."""
        for answer in self.answers[event]:
            answer.call(loop, *args)

    def due(self, event: str, step: int, epoch: int = 0) -> list[Answer]:
        """Those whose cadence is due at `step`, which completes `epoch` (0: none)."""
        return [answer for answer in self.answers[event] if answer.due.now(step, epoch)]

    def next(self, step: int, end: float) -> float:
        """The next step after `step` at which the host has something to do, in an epoch that ends at `end`."""
        until = math.inf
        for due in self._after:
            if due.next < until:
                until = due.next
        for due in self._before:
            before = (min(due.next, end) if due.cadence.epochs else due.next) - 1
            if step < before < until:
                until = before
        return until

    def deadline(self) -> float:
        """The next time at which something is due by the clock."""
        return min([due.deadline for due in self._timed]) if self._timed else math.inf

    def load(self, loop: Loop) -> None:
        """on_load for those who answer it."""
        for answer in self.answers["on_load"]:
            self._owed.add(answer.name)
            answer.call(loop)

    def begin(self, loop: Loop) -> None:
        """on_run_begin, one by one; whoever began is owed its end. Cadences start at the loop's step."""
        for answers in self.answers.values():
            for answer in answers:
                answer.due.start(loop.step)
        begins = {answer.name: answer for answer in self.answers["on_run_begin"]}
        for name in self._names:
            self._owed.add(name)
            if name in begins:
                begins[name].call(loop)

    def fail(self, loop: Loop, error: BaseException) -> None:
        """on_exception for those who began; what it raises becomes a note of the error."""
        loop._peers.fail(error, loop.step)
        for answer in self.answers["on_exception"]:
            if answer.name in self._owed:
                try:
                    answer.call(loop, error)
                except BaseException as another:
                    _add(error, another)

    def end(self, loop: Loop) -> None:
        """on_run_end in reverse order for those who began, always.

        The error that ended the run stays first, else one of these is raised: the first, but a
        signal that is handed on never hides a failure. The others are its notes.
        """
        before, errors = loop.error, []
        for answer in reversed(self.answers["on_run_end"]):
            if answer.name in self._owed:
                try:
                    answer.call(loop)
                except BaseException as error:
                    errors.append(error)
                    loop.error = loop.error or error
        failures = [error for error in errors if isinstance(error, Exception)]
        first = before or next(iter(failures + errors), None)
        for error in errors:
            if error is not first and first is not None:
                _add(first, error)
        if before is None and first is not None:
            raise first


def _add(error: BaseException, another: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(another, "__notes__", []))
    error.add_note(f"onstep: and then {type(another).__name__}: {another}{notes}")
