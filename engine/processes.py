"""Coordinate processes: decisions that depend on a clock, a signal, a file or an error are agreed on before any acts.

Every process runs the same script. They communicate through the barriers and the key-value store of JAX's
coordination service, which `jax.distributed.initialize` starts. It does not use the devices, so it cannot interfere
with the step's collectives. In a single process, every function returns at once.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jax._src import distributed  # the service has no public name; Orbax uses it by this one as well

from .activity import main_activity
from .messages import log_user, print_text

SLICE = 1000
"""Milliseconds between checks for a failed process, while waiting."""
POLL = 0.25
"""Seconds between checks for a failed process, beside the main thread."""
LOST = 10
"""Seconds without a sign of life after which a process counts as killed."""
PATIENCE = 45
"""Seconds without progress after which a message says what every process is doing."""
GRACE = 1
"""Seconds a process has to notice another's failure before it is ended, unless it is waiting for others."""
LEAVE = 3
"""Seconds that all processes have to leave the coordination service before one of them ends."""

_run = 0  # runs begun; the same in all processes
_number = 0  # agreements of this run
_stale: list[str] = []  # in process 0: keys to delete once all processes have read them
_waits: list[dict[str, Any]] = []  # what the threads of this process wait for; part of its sign of life
_checks = itertools.count(1)  # calls of should_stop, over all runs; the same in all processes
_watched = False  # whether a ProcessGroup watches the other processes
_failing = False  # whether the last run failed
_on_sigterm: Callable[[], None] | None = None


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
    if jax.process_count() == 1:
        return [value]
    given = _exchange([value], what)
    return [given[process][0] for process in range(jax.process_count())]


def first(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in process 0 only, and return its result, or raise its error, in every process.

    Process 0 does not wait for the others.

    Args:
        function: returns JSON values.
        args: arguments of the function.

    >>> first(max, 1, 2)
    2
    """
    global _number
    if jax.process_count() == 1:
        return function(*args)
    key, _number = f"onstep/{_run}/{_number}/first", _number + 1
    if not writes():
        result, kind, text = json.loads(_get(key, "for process 0"))
        if kind is None:
            return result
        kinds = {known.__name__: known for known in (FileExistsError, FileNotFoundError, ValueError)}
        raise kinds.get(kind, RuntimeError)(f"{text} (raised in process 0)")
    result = error = None
    try:
        result = function(*args)
    except Exception as raised:
        error = raised
    _store().key_value_set(key, json.dumps([result, error and type(error).__name__, error and str(error)]))
    _stale.append(key)
    if error is not None:
        raise error
    return result


def gather(name: str, value: Any) -> list[Any]:
    """Return the values of all processes in process 0, which waits for them. The others return an empty list at once.

    Unlike `agree`, it may be called by any thread.

    Args:
        name: the same in all processes, and not used before in this run.
        value: JSON values.

    Raises:
        ProcessError: another process failed in the meantime.

    >>> gather("sizes", 3)  # in a single process
    [3]
    """
    if jax.process_count() == 1:
        return [value]
    key, store = f"onstep/{_run}/{name}/", _store()
    if not writes():
        store.key_value_set(f"{key}{jax.process_index()}", json.dumps(value))
        return []
    others = [_get(f"{key}{process}", "for a part of a checkpoint") for process in range(1, jax.process_count())]
    store.key_value_delete(key)
    return [value, *map(json.loads, others)]


def check_same(values: dict[str, Any]) -> None:
    """Raise a ValueError in every process unless all have the same values; it names the first difference.

    Only a checksum of the values is exchanged, unless they differ.

    Args:
        values: JSON values by name.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values)
    own = hashlib.sha256(text.encode()).hexdigest()
    different = _exchange(values if own != first(lambda: own) else None, "at the start of a run")
    if different:
        zero, process = first(lambda: values), min(different)
        for name in {**zero, **different[process]}:
            a, b = zero.get(name), different[process].get(name)
            if a != b:
                raise ValueError(
                    f"All processes must have the same configuration: {name} is {_excerpt(a, b)} in process 0, "
                    f"{_excerpt(b, a)} in process {process}."
                )


class SameShapes:
    """Checks that the batches of a source have the same shapes in all processes. Communicates when they change.

    All processes must make one for the same source, at the same point of the program.

    Args:
        source: the data, for messages.

    Attributes:
        source: as given.
        batches: the number of batches that were checked.
        shapes: the shapes of the last one.
        newest: the newest one by source.
    """

    newest: ClassVar[dict[str, SameShapes]] = {}

    def __init__(self, source: str):
        self.source: str = source
        self.batches: int = 0
        self.shapes: str = ""
        self._key = f"onstep/{_run}/{_number}/{source}"
        self._before: Any = None
        self.newest[source] = self

    def check(self, batch: Any, describe: Callable[[], str]) -> None:
        """Check the next batch of this process.

        Args:
            batch: a value that changes when the shapes change.
            describe: returns the shapes as text.

        Raises:
            ProcessError: another process has a batch of another shape; the message shows both.
        """
        if batch != self._before:
            shapes, number = describe(), self.batches + 1
            waiting = {"source": self.source, "batch": number, "shapes": shapes}
            name = f"{self._key}/{number}/{hashlib.sha256(shapes.encode()).hexdigest()[:16]}"
            _barrier(name, "for a batch of the same shape", waiting)
            self._before, self.shapes = batch, shapes
        self.batches += 1


def failed() -> str | None:
    """Return the message of the first process that failed in this run, or None."""
    return _read(f"onstep/{_run}/failed") if jax.process_count() > 1 else None


def handle_sigterm(handler: Callable[[], None] | None) -> bool:
    """Call `handler` in every process, after the same step, when any process has received SIGTERM.

    With several processes JAX handles SIGTERM, and finds the next step that no process has begun yet. Without a handler
    the run then ends with exit status 143. Python's own handler for SIGTERM must not be replaced.

    Args:
        handler: called without arguments in the main thread, between two steps. None removes the last one.

    Returns:
        Whether JAX handles SIGTERM. If not, because there is only one process or because another handler is installed,
        `handler` is never called.

    >>> handle_sigterm(lambda: print("stopping"))  # in a single process
    False
    """
    global _on_sigterm
    _on_sigterm = handler
    watched = jax.process_count() > 1 and distributed.global_state.preemption_sync_manager is not None
    return watched and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
        self._clock, self._now, self._uses_clock = clock, clock(), True
        self._thread: threading.Thread | None = None
        self._terminated = False
        manager = distributed.global_state.preemption_sync_manager if self.count > 1 else None
        self._reached: Callable[[int], bool] = _never if manager is None else manager.reached_sync_point

    def begin(self, position: Callable[[], tuple[int, bool]]) -> None:
        """Watch the other processes until `fail` or `close`.

        Args:
            position: returns the number of the step in progress, and whether it is the last of its epoch.
        """
        global _run, _number, _watched, _failing
        if self.count > 1:
            _stale.append(f"onstep/{_run}/")
            _run, _number, _watched, _failing = _run + 1, 0, True, False
            SameShapes.newest.clear()
            atexit.unregister(_leave_after_failure)
            atexit.register(_leave_after_failure)  # runs before JAX's own function for this, which waits for minutes
            self._closed = threading.Event()
            self._thread = threading.Thread(
                target=_Watch(position, self._closed).watch, name="onstep-watch", daemon=True
            )
            self._thread.start()

    def clock(self) -> float:
        """Return the time in seconds; with several processes, that of process 0 at the last agreement."""
        self._uses_clock = True
        return self._clock() if self.count == 1 else self._now

    def should_stop(self) -> bool:
        """Return whether all processes stop after this step, because one received SIGTERM; call the handler for that.

        With several processes, all call this after every compiled call and at every agreement. JAX compares the number
        of calls: a call may run several steps, and a later run begins at step 0 again.
        """
        if not self._reached(next(_checks)):
            return False
        self._terminated = True
        if _on_sigterm is None:
            raise SystemExit(128 + signal.SIGTERM)
        _on_sigterm()
        return True

    def agree_on_stop(self, step: int, requested: tuple[str, bool] | None) -> tuple[str, bool] | None:
        """Return the stop that any process requested: its reason, and whether it is final.

        A process writes only if it requests a stop; process 0 also writes the time, if the run uses it.

        Args:
            step: steps completed.
            requested: the stop that this process requests, or None.

        Raises:
            ProcessError: another process failed, or is at another step.
        """
        time_now = self._clock() if self._uses_clock and writes() else None
        value = None if requested is None and time_now is None else {"stop": requested, "clock": time_now}
        given = _exchange(value, f"at step {step}", step)
        if 0 in given and given[0]["clock"] is not None:
            self._now = given[0]["clock"]
        self._uses_clock = False
        requests = [(process, *given[process]["stop"]) for process in sorted(given) if given[process]["stop"]]
        if not requests:
            return None
        process, reason, final = requests[0]
        return (reason if len(requests) == self.count else f"{reason} (requested by process {process})"), final

    def fail(self, error: BaseException, step: int) -> None:
        """Tell the others that this process failed, or note in its error that another one did. Stops watching."""
        global _failing
        _failing = True
        if self.count > 1 and not isinstance(error, ProcessError) and not self._terminated:
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
        global _watched
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._thread, _watched = None, False


class _Watch:
    """A thread that shows signs of life, and looks at those of the other processes.

    Process 0 looks at all others, which look only at process 0.
    """

    def __init__(self, position: Callable[[], tuple[int, bool]], closed: threading.Event):
        self._position, self._closed = position, closed
        self._me, self._run = jax.process_index(), _run
        self._signs: dict[int, dict[str, Any]] = {}  # of the other processes
        self._seen: dict[int, float] = {}  # when each changed last
        self._blamed: dict[int, tuple[str, int]] = {}  # by process: a complaint, and the beat at which it was seen
        self._positions: Any = None
        self._since = time.monotonic()  # when any process made progress last

    def watch(self) -> None:
        """Run until the group is closed, or until this process has to end because another one failed."""
        failure, beat, beats_at = None, 0, 0.0
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended, and JAX ends the process
            while not self._closed.wait(POLL):
                now = time.monotonic()
                if now >= beats_at:
                    late, beat, beats_at = now - beats_at > LOST / 2, beat + 1, now + 1.0
                    self._look(self._show(beat), now, late)
                if failure is None and (message := failed()):
                    failure = now, message
                limit = 5 * GRACE if _waits else GRACE  # what waits for others notices by itself
                if failure is not None and now - failure[0] > limit and not self._closed.is_set():
                    _end(failure[1])
            self._put({"ended": True})

    def _show(self, beat: int) -> dict[str, Any]:
        """Write and return the sign of life of this process."""
        activity, line = main_activity()
        step, epoch_done = self._position()
        own = {"beat": beat, "step": step, "epoch_done": epoch_done, "activity": activity, "line": line}
        own["waits"] = [*_waits]
        self._put(own)
        return own

    def _put(self, sign: dict[str, Any]) -> None:
        key = f"onstep/{self._run}/alive/{self._me}"
        _store().key_value_set(key, json.dumps(sign), allow_overwrite=True)

    def _look(self, own: dict[str, Any], now: float, late: bool) -> None:
        """Look at the signs of life of the other processes."""
        for process, sign in self._read_signs().items():
            if late or sign != self._signs.get(process):  # late: this process was suspended, perhaps with all others
                self._signs[process], self._seen[process] = sign, now
            if "ended" in sign:
                continue
            if now - self._seen[process] > LOST:
                _post(_silent(process, sign))
            complaint = _complaint(own, sign, process)
            before, beat = self._blamed.get(process, ("", sign["beat"]))
            if complaint and complaint == before and sign["beat"] != beat:  # a single sign may be out of date
                _post(complaint)
            if complaint != before:
                self._blamed[process] = complaint, sign["beat"]
        if self._me == 0:
            self._find_hang(own, now)

    def _read_signs(self) -> dict[int, dict[str, Any]]:
        if self._me:
            sign = _read(f"onstep/{self._run}/alive/0")
            return {0: json.loads(sign)} if sign else {}
        signs = {
            int(key.rsplit("/", 1)[1]): sign for key, sign in _store().key_value_dir_get(f"onstep/{self._run}/alive/")
        }
        return {process: json.loads(sign) for process, sign in signs.items() if process}

    def _find_hang(self, own: dict[str, Any], now: float) -> None:
        """Say what every process is doing, if none has made progress for long and they do not do the same."""
        signs = {0: own, **self._signs}
        positions = {process: (sign.get("step"), sign.get("activity")) for process, sign in sorted(signs.items())}
        if positions != self._positions:
            self._positions, self._since = positions, now
        if now - self._since > PATIENCE and len(set(positions.values())) > 1:
            self._since = float("inf")  # once
            alike: dict[str, list[str]] = {}
            for process in positions:
                alike.setdefault(_where(signs[process]), []).append(str(process))
            parts = [f"process{'es' * (len(those) > 1)} {', '.join(those)}: {where}" for where, those in alike.items()]
            log_user(f"no progress for {PATIENCE} s; {'; '.join(parts)}")


def _complaint(own: dict[str, Any], other: dict[str, Any], process: int) -> str:
    """Return why another process waits in vain for this one, or `""`."""
    me = jax.process_index()
    for there in other["waits"]:
        if "number" in there:
            steps = [here["step"] for here in own["waits"] if here.get("number") == there["number"]]
            if steps and steps[0] != there["step"]:  # at different barriers
                return _diverged((own, me), (other, process))
            if there["step"] is not None and _number == there["number"] and own["step"] > there["step"]:
                return _ran_out(there["step"], process)
        if "batch" in there and (here := SameShapes.newest.get(there["source"])):
            pending = [wait for wait in own["waits"] if wait.get("source") == there["source"]]
            reached, shapes = pending[0]["batch"] if pending else here.batches, here.shapes
            shapes = pending[0]["shapes"] if pending else shapes
            if reached >= there["batch"] and shapes != there["shapes"]:
                pair = sorted([(process, there["shapes"]), (me, shapes)])
                return (
                    f"A batch of the {there['source']} data has {pair[0][1]} in process {pair[0][0]}, but {pair[1][1]} "
                    f"in process {pair[1][0]}, after step {min(own['step'], other['step'])}. Every process needs the "
                    "same shapes: drop the short last batch, or pad it."
                )
    return ""


def _where(sign: dict[str, Any]) -> str:
    if "ended" in sign:
        return "ended"
    return f"at step {sign['step']}, {sign['activity']}" + (f" ({sign['line']})" if sign["line"] else "")


def _silent(process: int, sign: dict[str, Any]) -> str:
    return f"Process {process} is not responding: it has exited or was killed. It was last seen {_where(sign)}."


def _diverged(*signs: tuple[dict[str, Any], int]) -> str:
    steps = {sign["step"] for sign, _ in signs}
    done = [process for sign, process in signs if sign["epoch_done"]]
    if len(steps) > 1 or len(done) == 1:
        step, process = min((sign["step"], process) for sign, process in signs if len(steps) > 1 or process in done)
        return _ran_out(step, process)
    parts = "; ".join(
        f"process {process} is {_where(sign)}" for sign, process in sorted(signs, key=lambda pair: pair[1])
    )
    return f"Processes wait for each other in different places: {parts}. All must run the same code."


def _ran_out(step: int, process: int) -> str:
    return (
        f"Process {process} ran out of data at step {step + 1}, but another did not. "
        "Give every process the same number of batches, or pass epoch_steps=."
    )


def _never(check: int) -> bool:
    return False


def _excerpt(value: Any, other: Any) -> str:
    """Return a value as text; of two texts with several lines, only the first line that differs."""
    if isinstance(value, str) and isinstance(other, str) and "\n" in value:
        pairs = itertools.zip_longest(value.splitlines(), other.splitlines(), fillvalue="")
        value = next((one.strip() for one, two in pairs if one != two), value)
    return f"{value!r:.300}"


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


def _exchange(value: Any, what: str, step: int | None = None) -> dict[int, Any]:
    """Return, by process, the values that are not None. All processes must call it, in the same order."""
    global _number
    store, me, number, _number = _store(), jax.process_index(), _number, _number + 1
    key = f"onstep/{_run}/{number}/"
    if value is not None:
        store.key_value_set(f"{key}{me}", json.dumps(value))
    _barrier(f"{key}at {step}", f"for the others {what}", {"number": number, "step": step})
    given = store.key_value_dir_get(key)
    if me == 0:  # all processes have passed the barrier, and so have read everything before it
        for old in _stale:
            store.key_value_delete(old)
        _stale[:] = [key] if given else []
    return {int(name.rsplit("/", 1)[1]): json.loads(text) for name, text in given}


def _barrier(name: str, what: str, waiting: dict[str, Any]) -> None:
    """Wait until all processes are here."""
    attempts = itertools.count()  # a barrier that times out does so for all, late arrivals included
    _wait(lambda: _store().wait_at_barrier(f"{name}/{next(attempts)}", SLICE), what, waiting)


def _get(key: str, what: str) -> str:
    """Return the value that another process sets, waiting for it."""
    return _wait(lambda: _store().blocking_key_value_get(key, SLICE), what, {})


def _wait(call: Callable[[], Any], what: str, waiting: dict[str, Any]) -> Any:
    """Return the result of a call, repeating it as long as it times out."""
    began, told = time.monotonic(), False
    _waits.append(waiting)
    try:
        while True:
            try:
                return call()
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if message := failed():
                raise ProcessError(message)
            if not (told or _watched) and time.monotonic() - began > PATIENCE:
                told = True
                log_user(f"process {jax.process_index()} is waiting {what}".rstrip(), everywhere=True)
    finally:
        _waits.remove(waiting)


def _post(text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        _store().key_value_set(f"onstep/{_run}/failed", text)


def _end(message: str) -> None:
    """End this process: its main thread waits for a device forever, and nothing in Python can interrupt that."""
    print_text(f"onstep: ending process {jax.process_index()}: {message}", sys.stderr)
    _leave()
    os._exit(1)


def _leave() -> bool:
    """Leave the coordination service, where the others wait for this process; return False if that takes too long."""
    last = jax.process_index() == 0  # it runs the service
    leaving = threading.Thread(target=distributed.global_state.shutdown, name="onstep-leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE + last)
    return not leaving.is_alive()


def _leave_after_failure() -> None:
    if _failing and distributed.global_state.client is not None and not _leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _find_silent_process() -> str | None:
    """Explain why a collective failed: another process failed or stopped responding."""
    others = [process for process in range(jax.process_count()) if process != jax.process_index()]
    before = {process: _read(f"onstep/{_run}/alive/{process}") for process in others}
    for _ in range(6):
        time.sleep(0.5)
        if message := failed():
            return message
    for process in others:
        sign = before[process]
        if sign and sign == _read(f"onstep/{_run}/alive/{process}") and "ended" not in (values := json.loads(sign)):
            return _silent(process, values)
    return None
