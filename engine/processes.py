"""Many processes: what depends on a clock, a signal, a file or an error is agreed before anyone acts.

Every process runs the same script. They talk through the key-value store of JAX's own coordination
service, which `jax.distributed.initialize` starts; no device takes part, so nothing here can be
confused with the step's own communication. In one process every question has its answer at once.
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
"""Milliseconds between two looks at whether somebody failed, while waiting for an answer."""
PATIENCE = 60
"""Seconds of waiting after which a process says for whom."""
GRACE = 5
"""Seconds that a process has to notice that another failed, before it is ended."""

_run = 0  # runs begun; the same in all processes
_number = 0  # of what was agreed in it


class ProcessError(RuntimeError):
    """Another process failed; its own output has the error."""


def writes() -> bool:
    """Whether this process writes logs, progress and files: process 0 does."""
    return jax.process_index() == 0


def agree(value: Any, what: str = "") -> list[Any]:
    """What every process gave, in the order of processes. All must call it, in the same order.

    Args:
        value: JSON values.
        what: this is about, for whoever has to wait.

    Raises:
        ProcessError: one of them failed meanwhile.
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
    store.key_value_delete(f"onstep/{_run}/{number - 1}/")  # all have read that: they are here
    return values


def first(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in process 0, or raises there, in every process.

    Args:
        function: returns JSON values.
        args: of the function.
    """
    if jax.process_count() == 1:
        return function(*args)
    result = error = None
    if writes():
        try:
            result = function(*args)
        except Exception as raised:
            error = raised
    said = agree([result, error and type(error).__name__, error and str(error)])[0]
    if error is not None:
        raise error
    if said[1] is not None:
        kinds = {kind.__name__: kind for kind in (FileExistsError, FileNotFoundError, ValueError)}
        raise kinds.get(said[1], RuntimeError)(f"{said[2]} (raised in process 0)")
    return said[0]


def same(values: dict[str, Any]) -> None:
    """Raises a ValueError in every process unless all gave the same; it names the first difference."""
    given = agree(values, "the begin of a run")
    for process, other in enumerate(given):
        for name in {**given[0], **other}:
            a, b = given[0].get(name), other.get(name)
            if a != b:
                raise ValueError(
                    f"All processes need to run the same: {name} is {a!r:.300} in process 0, "
                    f"{b!r:.300} in process {process}."
                )


def failed() -> str | None:
    """What the first process that failed in this run said, None if none did."""
    return _read(f"onstep/{_run}/failed") if jax.process_count() > 1 else None


class Peers:
    """The processes of one run: agrees on its time and its stop, and sees that nobody waits in vain.

    Alone it is nothing but a clock.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self.count: int = jax.process_count()
        self._own, self._now = clock, clock()
        self._thread: threading.Thread | None = None

    def begin(self, step: Callable[[], int]) -> None:
        """The run begins: from here on somebody watches, until `fail` or `close`.

        Args:
            step: gives the number of the step that was begun last, where the data cannot tell how
                many there are; else 0.
        """
        global _run, _number
        if self.count > 1:
            _run, _number = _run + 1, 0
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(step,), name="onstep-watch", daemon=True)
            self._thread.start()

    def clock(self) -> float:
        """The time in seconds: of several processes that of process 0, when they last agreed."""
        return self._own() if self.count == 1 else self._now

    def stand(self, step: int, stop: tuple[str, bool] | None) -> tuple[str, bool] | None:
        """Says where this process stands; the stop that one of them asks for, and whether it is final.

        Raises:
            ProcessError: another process failed, or is at another step.
        """
        stands = agree({"step": step, "stop": stop, "clock": self._own()}, f"step {step}")
        self._now = stands[0]["clock"]
        for process, other in enumerate(stands):
            if other["step"] != step:
                raise ProcessError(_ran_out(*min((other["step"], process), (step, jax.process_index()))))
        asked = [(process, *other["stop"]) for process, other in enumerate(stands) if other["stop"]]
        if not asked:
            return None
        process, reason, final = asked[0]
        return (reason if len(asked) == self.count else f"{reason} (asked for by process {process})"), final

    def fail(self, error: BaseException, step: int) -> None:
        """Tells the others that this process failed; or its error, that another one did. Ends the watch."""
        if self.count > 1 and not isinstance(error, ProcessError):
            said, own = failed(), f"{type(error).__name__}: {str(error)[:500]}"
            if said is None and isinstance(error, jax.errors.JaxRuntimeError):
                said = _who_is_gone()
            if said is None:
                _post(f"Process {jax.process_index()} failed at step {step}: {own}")
            elif own not in said:  # where all find the same mistake, none has to tell the others
                error.add_note(f"onstep: {said}")
        self.close()

    def close(self) -> None:
        """Ends the watch."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _watch(self, step: Callable[[], int]) -> None:
        """Gives signs of life; ends the process where it waits for one that failed."""
        since, before, said = None, None, None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and JAX ends the process
            for beat in itertools.count():
                _store().key_value_set(f"onstep/alive/{jax.process_index()}", str(beat), allow_overwrite=True)
                late = self._late(step())
                if late is not None and late == before:  # twice: this thread sees the loop amid its changes
                    _post(_ran_out(*late))
                before = late
                if since is None and (said := failed()):
                    since = time.monotonic()
                if since is not None and time.monotonic() - since > GRACE:
                    # The main thread waits for a device, for ever; nothing in Python can end that.
                    print(f"onstep: process {jax.process_index()} is ended: {said}", file=sys.stderr, flush=True)
                    os._exit(1)
                if self._over.wait(1.0):
                    return

    def _late(self, here: int) -> tuple[int, int] | None:
        """The step and the number of a process that waits at an earlier step than `here`, in which this one is."""
        others = range(1, self.count) if jax.process_index() == 0 else [0]
        for process in others if here else []:
            stands = _read(f"onstep/{_run}/{_number}/{process}")
            step = json.loads(stands).get("step") if stands and stands.startswith("{") else None
            if step is not None and step < here:
                return step, process
        return None


def _ran_out(step: int, process: int) -> str:
    return (
        f"Process {process} ran out of data at step {step + 1}, and another did not. "
        "Give every process as many batches, or epoch_steps=."
    )


def _store() -> Any:
    store = distributed.global_state.client
    if store is None:
        raise RuntimeError("Several processes need jax.distributed.initialize() before anything else.")
    return store


def _read(key: str) -> str | None:
    try:
        return _store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # not there; or the service is gone, to which JAX itself answers
        return None


def _get(key: str, process: int, what: str) -> str:
    """The value that a process sets, waited for."""
    began, said = time.monotonic(), False
    while True:
        try:
            return _store().blocking_key_value_get(key, SLICE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if message := failed():
            raise ProcessError(message)
        if not said and time.monotonic() - began > PATIENCE:
            said = True
            log_user(f"process {jax.process_index()} waits for process {process} {what}".rstrip(), everywhere=True)


def _post(text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody was first
        _store().key_value_set(f"onstep/{_run}/failed", text)


def _who_is_gone() -> str | None:
    """What explains that a device's communication broke: a failure, or a process without a sign of life."""
    others = [process for process in range(jax.process_count()) if process != jax.process_index()]
    before = {process: _read(f"onstep/alive/{process}") for process in others}
    for _ in range(6):
        time.sleep(0.5)
        if message := failed():
            return message
    gone = [process for process in others if _read(f"onstep/alive/{process}") == before[process]]
    return f"Process {gone[0]} gives no sign of life: it has ended, or was killed." if gone else None
