"""Configurations and texts without their secrets, for logs, files and experiment trackers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
"""Replacement for a secret."""

_SECRET = re.compile(
    r"passw|passphrase|pwd|secret|credential|authorization|cookie|bearer|webhook"
    r"|(api|access|account|auth|encryption|private|signing|ssh|storage|subscription)[-_. ]?key",
    re.IGNORECASE,
)
"""Names whose values are always secret."""
_DOUBTFUL = re.compile(r"token(?!i[sz])|(?<![a-z])(auth|pass|pw)(?![a-z])", re.IGNORECASE)
"""Names whose values are secret only if they are text: `max_tokens` and `pad_token_id` hold numbers.

`tokenizer` is excluded.
"""
_USER = re.compile(r"(\w://)(?:[^\s/:]*:\S*|[^\s/?#]*)@")
"""User and password in a URL. After a colon, up to the last `@`, because a password may contain any character."""
_GIVEN = re.compile(
    rf"""((?:{_SECRET.pattern}|{_DOUBTFUL.pattern})[\w.-]{{0,64}}["']?\s*[=:]\s*(?:(?:basic|bearer|token)\s+)?)"""
    r"""("[^"]*"|'[^']*'|[^\s"'&,;)}\]]+)""",
    re.IGNORECASE,
)
"""`name=value` and `name: value` inside a text."""


def redacted(config: Any) -> dict[str, bool | int | float | str | None]:
    """Return a configuration as one flat dict, such as `{"optimizer.rate": 0.1}`, with `"***"` for each secret.

    Built-in callbacks do this with their `config=`. Use it before you write a configuration to a log or a file.
    Values count as secret by their names, such as `token`, `password` or `api_key`. That includes names inside a
    text (`?api_key=...`). User and password in a URL are secret as well. A secret under a harmless name stays visible.

    Args:
        config: a dict, dataclass or pydantic model, which may be nested.

    Returns:
        Values by dotted name. A list of plain values becomes one string.

    Raises:
        TypeError: `config` has another type.

    >>> redacted({"data": {"url": "https://me:1234@host/x", "rows": 8}, "api_key": "sk-1"})
    {'data.url': 'https://***@host/x', 'data.rows': 8, 'api_key': '***'}
    """
    fields = _fields(config)
    if not isinstance(fields, Mapping):
        raise TypeError(f"config needs a dict, a dataclass or a pydantic model, got {type(config).__name__}.")
    return dict(_leaves("", fields)) if fields else {}


def without_secrets(text: str) -> str:
    """Return a text in which `***` replaces each secret.

    It finds `name=value` and `name: value` with a name such as `token`, `password` or `api_key`, and user and password
    in a URL. Use it for error messages and other free text before you write them to a file that others can read.

    Args:
        text: any text.

    >>> without_secrets("cannot read https://me:1234@host/data?api_key=sk-1&page=2")
    'cannot read https://***@host/data?api_key=***&page=2'
    """
    return _GIVEN.sub(lambda found: found[1] + HIDDEN, _USER.sub(rf"\1{HIDDEN}@", text))


def _fields(value: Any) -> Any:
    """Return the fields of a dataclass or pydantic model as a dict, and any other value unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return value.model_dump()
    return value


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    value = _fields(value)
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple, set, frozenset)) and any(_nested(item) for item in value):
        items = enumerate(value)
    if items:
        for key, item in items:
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    else:
        yield without_secrets(path), _shown(path, value)


def _nested(value: Any) -> bool:
    return isinstance(_fields(value), (Mapping, list, tuple, set, frozenset))


def _shown(path: str, value: Any) -> Any:
    number = isinstance(value, (int, float))
    if value is not None and not isinstance(value, bool) and _SECRET.search(path):
        return HIDDEN
    if value is None or number:
        return value
    return HIDDEN if _DOUBTFUL.search(path) else without_secrets(str(getattr(value, "__name__", value)))
