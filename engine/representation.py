"""Reprs that look like constructor calls."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def call_text(kind: type, values: Mapping[str, Any]) -> str:
    """Return a constructor call as text, without the arguments that have their default values.

    Args:
        kind: the class.
        values: its arguments by name; missing ones are left out.
    """
    shown = []
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.name not in values or parameter.kind is parameter.VAR_KEYWORD:
            continue
        value = values[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            shown += map(_text, value)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            shown.append(_text(value))
        elif not _same(value, parameter.default):
            shown.append(f"{parameter.name}={_text(value)}")
    return f"{kind.__name__}({', '.join(shown)})"


_PATHS = ("path", "directory", "png", "events")
"""Arguments that may differ, such as directories of one process each."""


def plain_arguments(instance: Any) -> str:
    """Return the arguments of an object that can be compared, as text: numbers, strings and None, without paths.

    >>> from onstep.testing import StopAt
    >>> plain_arguments(StopAt(2, reason="enough"))
    "step=2, final=True, reason='enough'"
    """
    names = [name for name in inspect.signature(type(instance)).parameters if hasattr(instance, name)]
    given = {name: getattr(instance, name) for name in names if name not in _PATHS}
    plain = {name: value for name, value in given.items() if value is None or isinstance(value, (int, float, str))}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def _text(value: Any) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    return _SHORT.repr(value) if isinstance(value, (str, list, tuple, dict)) else f"{value!r:.200}"


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
