"""Which host halves change a run, and so take part when one of its steps is replayed."""

from __future__ import annotations

import dis
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from .callback import EVENTS, Callback, overridden


def find_influences(
    callbacks: dict[str, Callback], known: list[dict[str, list[str]]], *, complete: bool
) -> dict[str, Callback]:
    """Return the callbacks whose host half takes part in a replay: those that change the state or the batches.

    If there is one, those that record numbers take part as well, because it may read them.

    Args:
        callbacks: of the run, by name.
        known: what the run saved about them: the names that have `"changed"` something, and those that have
            `"recorded"` numbers.
        complete: whether that was saved after the step that is replayed. If not, the code of the callbacks decides.

    Raises:
        RuntimeError: the body of a `for` over the run changed the state.

    >>> class Decay(Callback):
    ...     def on_epoch_end(self, loop):
    ...         loop.state = loop.state / 2
    >>> list(find_influences({"Decay": Decay(), "another": Callback()}, [], complete=False))
    ['Decay']
    """
    changing, recording = ({n for each in known for n in each.get(how, ())} for how in ("changed", "recorded"))
    if "" in changing:
        raise RuntimeError(
            "engine.replay cannot repeat a run whose state was changed in the body of `for loop in engine.steps(...)`. "
            "Change it in a callback instead."
        )
    if not complete:
        changing |= {name for name, callback in callbacks.items() if _changes(callback)}
        recording |= {name for name, callback in callbacks.items() if _records(callback)}
    names = changing | recording if changing else changing
    return {name: callback for name, callback in callbacks.items() if name in names}


def _changes(callback: Callback) -> bool:
    """Return whether the code of a callback assigns the state or the batch of a loop: `loop.state = ...`."""
    return any(
        one.opname == "STORE_ATTR" and one.argval in ("state", "batch") and _is_loop(before, code)
        for code in _code(callback)
        for before, one in _pairs(code)
    )


def _records(callback: Callback) -> bool:
    """Return whether the code of a callback records numbers: `loop.log(...)`."""
    return any(
        one.argval == "log" and _is_loop(before, code) for code in _code(callback) for before, one in _pairs(code)
    )


def _pairs(code: types.CodeType) -> Iterator[tuple[dis.Instruction, dis.Instruction]]:
    return itertools.pairwise(dis.get_instructions(code))


def _is_loop(loaded: dis.Instruction, code: types.CodeType) -> bool:
    """Return whether an instruction loads an argument of its function that can be the loop."""
    name = loaded.argval[-1] if isinstance(loaded.argval, tuple) else loaded.argval
    return loaded.opname.startswith("LOAD_FAST") and name in code.co_varnames[: code.co_argcount] and name != "self"


def _code(callback: Callback) -> Iterator[types.CodeType]:
    """Yield the code of the handlers of a callback, and of the methods and functions of the same module it calls."""
    waiting: list[Any] = [method for event in EVENTS if (method := overridden(callback, event))]
    seen = set[types.CodeType]()
    while waiting:
        function = waiting.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        yield code
        yield from (inner for inner in code.co_consts if isinstance(inner, types.CodeType))
        called = [getattr(type(callback), name, None) or function.__globals__.get(name) for name in code.co_names]
        waiting += [each for each in called if getattr(each, "__module__", "") == function.__module__]
