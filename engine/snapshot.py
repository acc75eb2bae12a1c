"""Snapshots: everything a run needs to resume, and host values as bytes (JSON and arrays, never code)."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .placement import read

_ARRAY, _BYTES = "__array__", "__bytes__"


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment from which it can resume; made by `loop.snapshot()`, used by `loop.restore(snapshot)`.

    Attributes:
        step: steps completed.
        tree: `{"state": state, "carries": {name: carry}}`, the live arrays. The next step donates them, so copy
            or write anything you need after the event. Or a function that loads such a tree, given one like it.
        host: everything else, as bytes.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> result = Engine(lambda state, batch: (state + batch, {})).run(jnp.int32(0), [1, 2], epochs=1)
    >>> result.snapshot.step, int(result.snapshot.tree["state"])
    (2, 3)
    """

    step: int
    tree: Any
    host: bytes


def pack(value: Any, who: str) -> bytes:
    """Serialize a dict of JSON values, numpy arrays and bytes.

    Raises:
        TypeError: the value contains something else; the message says whose it is and where.
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
    """Return what was given to `pack`; tuples come back as lists.

    >>> unpack(pack({"best": 0.5, "steps": np.arange(2)}, "example"))
    {'best': 0.5, 'steps': array([0, 1])}
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:

        def restore(value: dict[str, Any]) -> Any:
            if _ARRAY in value:
                return arrays[value[_ARRAY]]
            return base64.b64decode(value[_BYTES]) if _BYTES in value else value

        return json.loads(arrays["json"].tobytes(), object_hook=restore)


def describe_key(key: Any) -> dict[str, Any] | None:
    """Return a random key as JSON values, to tell whether two keys are the same."""
    if key is None:
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = read(jax.random.key_data(key) if typed else key)
    return {"impl": str(jax.random.key_impl(key)) if typed else "raw", "data": data.tolist()}
