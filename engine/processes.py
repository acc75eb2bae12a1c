"""Coordinate processes: decisions that depend on a clock, a signal, a file or an error are agreed on before any acts.

Every process runs the same script. They communicate through the key-value store of JAX's coordination service,
which `jax.distributed.initialize` starts. It does not use the devices, so it cannot interfere with the step's
collectives. In a single process, every function returns at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; Orbax uses it by this one as well

from .messages import log_user

SLICE = 1000
"""Milliseconds between checks for a failed process, while waiting for a value."""
PATIENCE = 60
"""Seconds of waiting after which a process says which process it is waiting for."""
GRACE = 5
"""Seconds a process has to notice another's failure before it is killed."""

_run = 0  # runs begun; the same in all processes
_number = 0  # agreements of this run


class ProcessError(RuntimeError):
    """Another process failed. The output of that process shows the error."""


def writes() -> bool:
    """Return whether this process writes logs, progress and files: only process 0 does.

    >>> writes()
    True
    """
    return jax.process_index() == 0


def agree(value: Any, what: str = "") -> list[Any]:
    """Return the values of all processes, in the order of processes. All must call it, in the same order.

    Args:
        value: JSON values.
        what: what the value is about, for messages while waiting.

    Raises:
        ProcessError: another process failed in the meantime.

    >>> agree({"step": 3})  # in a single process
    [{'step': 3}]
    """
    global _number
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    store, number, _number = _store(), _number, _number + 1
    key = f"onstep/{_run}/{number}"
    store.key_value_set(f"{key}/{me}", json.dumps(value))
    if me:
        return json.loads(_get(f"{key}/all", 0, what))
    values = [json.loads(_get(f"{key}/{process}", process, what)) for process in range(count)]
    store.key_value_set(f"{key}/all", json.dumps(values))
    store.key_value_delete(f"onstep/{_run}/{number - 1}/")  # everyone has read it, or they would not be here
    return values


def first(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in process 0 only, and return its result, or raise its error, in every process.

    Args:
        function: returns JSON values.
        args: arguments of the function.

    >>> first(max, 1, 2)
    2
    """
    if jax.process_count() == 1:
        return function(*args)
    result = error = None
    if writes():
        try:
            result = function(*args)
        except Exception as raised:
            error = raised
    outcome = agree([result, error and type(error).__name__, error and str(error)])[0]
    if error is not None:
        raise error
    if outcome[1] is not None:
        kinds = {kind.__name__: kind for kind in (FileExistsError, FileNotFoundError, ValueError)}
        raise kinds.get(outcome[1], RuntimeError)(f"{outcome[2]} (raised in process 0)")
    return outcome[0]


def check_same(values: dict[str, Any]) -> None:
    """Raise a ValueError in every process unless all have the same values; it names the first difference."""
    given = agree(values, "at the start of a run")
    for process, other in enumerate(given):
        for name in {**given[0], **other}:
            a, b = given[0].get(name), other.get(name)
            if a != b:
                raise ValueError(
                    f"All processes must have the same configuration: {name} is {a!r:.300} in process 0, "
                    f"{b!r:.300} in process {process}."
                )


def failed() -> str | None:
    """Return the message of the first process that failed in this run, or None."""
    return _read(f"onstep/{_run}/failed") if jax.process_count() > 1 else None


class ProcessGroup:
    """The processes of one run: agrees on time and stops, and notices a process that fails or stops responding.

    In a single process it is only a clock.

    Args:
        clock: the time in seconds.

    Attributes:
        count: the number of processes.
    """

    def __init__(self, clock: Callable[[], float]):
        self.count: int = jax.process_count()
        self._clock, self._now = clock, clock()
        self._thread: threading.Thread | None = None

    def begin(self, current_step: Callable[[], int]) -> None:
        """Watch the other processes until `fail` or `close`.

        Args:
            current_step: returns the number of the step in progress if the data has no length, else 0.
        """
        global _run, _number
        if self.count > 1:
            _run, _number = _run + 1, 0
            self._closed = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(current_step,), name="onstep-watch", daemon=True)
            self._thread.start()

    def clock(self) -> float:
        """Return the time in seconds; with several processes, that of process 0 at the last agreement."""
        return self._clock() if self.count == 1 else self._now

    def agree_on_stop(self, step: int, requested: tuple[str, bool] | None) -> tuple[str, bool] | None:
        """Return the stop that any process requested: its reason, and whether it is final.

        Args:
            step: steps completed.
            requested: the stop that this process requests, or None.

        Raises:
            ProcessError: another process failed, or is at another step.
        """
        states = agree({"step": step, "stop": requested, "clock": self._clock()}, f"at step {step}")
        self._now = states[0]["clock"]
        for process, other in enumerate(states):
            if other["step"] != step:
                raise ProcessError(_ran_out(*min((other["step"], process), (step, jax.process_index()))))
        requests = [(process, *other["stop"]) for process, other in enumerate(states) if other["stop"]]
        if not requests:
            return None
        process, reason, final = requests[0]
        return (reason if len(requests) == self.count else f"{reason} (requested by process {process})"), final

    def fail(self, error: BaseException, step: int) -> None:
        """Tell the others that this process failed, or note in its error that another one did. Stops watching."""
        if self.count > 1 and not isinstance(error, ProcessError):
            known, own = failed(), f"{type(error).__name__}: {str(error)[:500]}"
            if known is None and isinstance(error, jax.errors.JaxRuntimeError):
                known = _find_silent_process()
            if known is None:
                _post(f"Process {jax.process_index()} failed at step {step}: {own}")
            elif own not in known:  # if all failed the same way, the note adds nothing
                error.add_note(f"onstep: {known}")
        self.close()

    def close(self) -> None:
        """Stop watching."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._thread = None

    def _watch(self, current_step: Callable[[], int]) -> None:
        """Send heartbeats, and kill this process if it waits for one that failed."""
        since, before, message = None, None, None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended, and JAX ends the process
            for beat in itertools.count():
                _store().key_value_set(f"onstep/alive/{jax.process_index()}", str(beat), allow_overwrite=True)
                late = self._find_late_process(current_step())
                if late is not None and late == before:  # seen twice, because one reading may be stale
                    _post(_ran_out(*late))
                before = late
                if since is None and (message := failed()):
                    since = time.monotonic()
                if since is not None and time.monotonic() - since > GRACE:
                    # The main thread waits for a device forever, and nothing in Python can interrupt that.
                    print(f"onstep: ending process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
                    os._exit(1)
                if self._closed.wait(1.0):
                    return

    def _find_late_process(self, here: int) -> tuple[int, int] | None:
        """Return step and number of a process that waits at an earlier step than `here`, the step of this process."""
        others = range(1, self.count) if jax.process_index() == 0 else [0]
        for process in others if here else []:
            state = _read(f"onstep/{_run}/{_number}/{process}")
            step = json.loads(state).get("step") if state and state.startswith("{") else None
            if step is not None and step < here:
                return step, process
        return None


def _ran_out(step: int, process: int) -> str:
    return (
        f"Process {process} ran out of data at step {step + 1}, but another did not. "
        "Give every process the same number of batches, or pass epoch_steps=."
    )


def _store() -> Any:
    store = distributed.global_state.client
    if store is None:
        raise RuntimeError("Several processes need jax.distributed.initialize() before anything else.")
    return store


def _read(key: str) -> str | None:
    try:
        return _store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # not set, or the service has ended, which JAX itself reports
        return None


def _get(key: str, process: int, what: str) -> str:
    """Return the value that a process sets, waiting for it."""
    began, told = time.monotonic(), False
    while True:
        try:
            return _store().blocking_key_value_get(key, SLICE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if message := failed():
            raise ProcessError(message)
        if not told and time.monotonic() - began > PATIENCE:
            told = True
            text = f"process {jax.process_index()} is waiting for process {process} {what}"
            log_user(text.rstrip(), everywhere=True)


def _post(text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        _store().key_value_set(f"onstep/{_run}/failed", text)


def _find_silent_process() -> str | None:
    """Explain why a collective failed: another process failed or stopped responding."""
    others = [process for process in range(jax.process_count()) if process != jax.process_index()]
    before = {process: _read(f"onstep/alive/{process}") for process in others}
    for _ in range(6):
        time.sleep(0.5)
        if message := failed():
            return message
    silent = [process for process in others if _read(f"onstep/alive/{process}") == before[process]]
    return f"Process {silent[0]} is not responding: it has exited or was killed." if silent else None
