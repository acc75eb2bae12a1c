"""Notes on errors that the user's functions raise: which function it was, and which line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import linecache
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

BUNDLE = "_bundle"
"""The first argument of the compiled call, as JAX names it in errors; its first part is the user's state."""
KEPT_TRACER = (
    "an array of a compiled function has no value outside of it. Return it from the step: as a metric, or in the state."
)
"""What to do about a tracer that is used after the trace."""
TRACER_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.UnexpectedTracerError,
)
"""What JAX raises if a value is read that is unknown while a function is traced, or after that."""
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
"""Folders of Python and of installed packages."""


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, or the type of another callable."""
    return getattr(function, "__name__", type(function).__name__)


def call_signature(step: Callable[..., Any]) -> inspect.Signature:
    """Return the signature `(bundle, batch, rng, due)` of the compiled call, with the step's own names."""
    names = [BUNDLE, *_argument_names(step)[1:], "_due"]
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names])


def _argument_names(step: Callable[..., Any]) -> list[str]:
    names = ["state", "batch", "rng"]
    with contextlib.suppress(ValueError):  # some builtins have no signature
        parameters = inspect.signature(step).parameters.values()
        given = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names[: len(given)] = given[:3]
    return names


@contextlib.contextmanager
def note_origin(who: str, function: Callable[..., Any]) -> Iterator[None]:
    """Add a note to an error raised inside: in which function of the user's, and at which line.

    Args:
        who: the function, for the note.
        function: the function.
    """
    try:
        yield
    except Exception as error:
        _use_own_names(error, function)
        error.add_note(f"onstep: raised by {who}{_place(error, function)}")
        if advice := _advice(error):
            error.add_note(f"onstep: {advice}")
        raise


def _advice(error: Exception) -> str:
    """Return what to do about an error that does not say it itself; `""` if it is unknown."""
    if type(error).__name__ == "TraceContextError":  # Flax's, which need not be installed
        return (
            "what the step changes must be in the state that it receives, such as an NNX optimizer: "
            'engine.run({"model": model, "optimizer": optimizer}, ...).'
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return KEPT_TRACER
    if isinstance(error, TRACER_ERRORS):
        return (
            "the step is compiled, so its arrays have no values yet. Return a number as a metric, print with "
            "jax.debug.print, and branch with jnp.where or jax.lax.cond. Engine(..., jit=False) runs it uncompiled."
        )
    if isinstance(error, dataclasses.FrozenInstanceError):
        return "make a changed copy instead: state = state.replace(params=params), ctx = ctx.replace(state=state)."
    return ""


def _use_own_names(error: Exception, step: Callable[..., Any]) -> None:
    """In JAX's message, replace the names of the bundle's parts with those that the user knows."""
    if len(error.args) == 1 and isinstance(error.args[0], str) and f"{BUNDLE}[" in error.args[0]:
        parts = {"0": _argument_names(step)[0], "1": "carries", "2": "step"}
        error.args = (re.sub(rf"{BUNDLE}\[(\d)\]", lambda match: parts[match[1]], error.args[0]),)


def _place(error: Exception, function: Callable[..., Any]) -> str:
    """Return the last line of the user's that an error passed through, or else where the function is defined."""
    lines = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__) if not _is_library(f)]
    if lines:
        file, line = lines[-1]
        return f", {file} line {line}: {linecache.getline(file, line).strip()}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = (getattr(function, "__module__", None) or "").startswith("onstep.")
    return "" if own or code is None else f", {code.co_filename} line {code.co_firstlineno}"


def _is_library(frame: FrameType) -> bool:
    file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
    return module.startswith("onstep.") or file.startswith((*LIBRARIES, "<frozen"))
