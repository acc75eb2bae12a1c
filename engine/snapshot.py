"""Everything a run needs to go on, and host values as bytes: JSON and arrays, nothing that runs code."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAY, _BYTES = "__array__", "__bytes__"


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment at which it can go on.

    Attributes:
        step: steps completed.
        tree: `{"state": state, "carries": {name: carry}}`, the live arrays: the next step donates
            them, so copy or write what must outlive the event. Or a function that loads such a
            tree, given one like it.
        host: the rest, as bytes (`unpack` reads them).
    """

    step: int
    tree: Any
    host: bytes


def pack(value: Any, who: str) -> bytes:
    """A dict of JSON values, numpy arrays and bytes, serialised.

    Raises:
        TypeError: something else is in it; the message names `who` and where.
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value) and not {_ARRAY, _BYTES} & set(value):
            return {key: plain(item, f"{path}[{key!r}]") for key, item in value.items()}
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcSU":
            arrays[str(len(arrays))] = np.asarray(value)
            return {_ARRAY: str(len(arrays) - 1)}
        if isinstance(value, bytes):
            return {_BYTES: base64.b64encode(value).decode()}
        raise TypeError(
            f"{who} needs JSON values, numpy arrays and bytes, got {type(value).__name__} at {path or 'the top'}."
        )

    text = json.dumps(plain(value, "")).encode()
    buffer = io.BytesIO()
    np.savez(buffer, json=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given; tuples come back as lists."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:

        def whole(value: dict[str, Any]) -> Any:
            if _ARRAY in value:
                return arrays[value[_ARRAY]]
            return base64.b64decode(value[_BYTES]) if _BYTES in value else value

        return json.loads(arrays["json"].tobytes(), object_hook=whole)


def describe_key(key: Any) -> dict[str, Any] | None:
    """A random key as JSON values, to tell whether two are the same."""
    if key is None:
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(key) if typed else key)
    return {"impl": str(jax.random.key_impl(key)) if typed else "raw", "data": data.tolist()}
