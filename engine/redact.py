"""Configurations as flat names and values, without their secrets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

_SECRET = re.compile(
    r"passw|passphrase|pwd|secret|credential|authorization|cookie|bearer|webhook"
    r"|(api|access|account|auth|encryption|private|signing|ssh|storage|subscription)[-_. ]?key",
    re.IGNORECASE,
)
"""Names of which every value is a secret."""
_DOUBTFUL = re.compile(r"token(?!i[sz])|(?<![a-z])(auth|pass|pw)(?![a-z])", re.IGNORECASE)
"""Names of which only text is: `max_tokens` and `pad_token_id` are numbers, `tokenizer` is another word."""
_USER = re.compile(r"(\w://)(?:[^\s/:]*:\S*|[^\s/?#]*)@")
"""Where there is a colon up to the last `@`, as a password may hold anything."""
_GIVEN = re.compile(
    rf"""((?:{_SECRET.pattern}|{_DOUBTFUL.pattern})[\w.-]{{0,64}}["']?\s*[=:]\s*(?:(?:basic|bearer|token)\s+)?)"""
    r"""("[^"]*"|'[^']*'|[^\s"'&,;)}\]]+)""",
    re.IGNORECASE,
)
"""`name=value` and `name: value` within a text."""


def redacted(config: Any) -> dict[str, bool | int | float | str | None]:
    """A configuration as one flat dict, `{"optimizer.rate": 0.1}`, with `"***"` for what is secret.

    Secret are the values under names such as `token`, `password` or `api_key`, also within a text
    (`?api_key=...`), and in a URL what stands before `@`. Lists of plain values become one text.

    Args:
        config: a dict, dataclass or pydantic model, nested or not.

    Raises:
        TypeError: it is none of these.

    >>> redacted({"data": {"url": "https://me:1234@host/x", "rows": 8}, "api_key": "sk-1"})
    {'data.url': 'https://***@host/x', 'data.rows': 8, 'api_key': '***'}
    """
    fields = _fields(config)
    if not isinstance(fields, Mapping):
        raise TypeError(f"config needs a dict, a dataclass or a pydantic model, got {type(config).__name__}.")
    return dict(_leaves("", fields)) if fields else {}


def without_secrets(text: str) -> str:
    """A text with the secrets that it shows replaced by `***`."""
    return _GIVEN.sub(lambda found: found[1] + HIDDEN, _USER.sub(rf"\1{HIDDEN}@", text))


def _fields(value: Any) -> Any:
    """A dataclass or a pydantic model as a dict of its fields, anything else as it is."""
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
