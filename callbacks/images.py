"""Pictures drawn from the state: PNG files and TensorBoard."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Loop, event_files, every, processes
from onstep.sharding import to_host


class Images(Callback):
    """Draws pictures from the state, such as samples of a generative model, and writes them.

    Several are put into one, row by row, in a grid about as wide as it is high.

    Args:
        draw: `state -> {name: pictures}`, of shape (H, W, C) or (N, H, W, C) with 1, 3 or 4
            channels; uint8, or floats that are cut to [0, 1], NaN to 0.
        png: a directory for files such as `step-001000-samples.png`.
        events: a directory for TensorBoard, which may be that of TensorBoard's other files.
        when: when to draw; a plain int means steps.
        using: a callback whose `apply(loop)` gives the state to draw from: `using=ema`.
        name: the callback's name.

    Raises:
        ValueError: no directory; `using` is not among the run's callbacks (at the start); or, when
            they are drawn, something that is no picture.
    """

    def __init__(
        self,
        draw: Callable[[Any], dict[str, Any]],
        *,
        png: str | os.PathLike[str] | None = None,
        events: str | os.PathLike[str] | None = None,
        when: Cadence | int = every(epochs=1),  # noqa: B008 (frozen)
        using: Any = None,
        name: str | None = None,
    ):
        if png is None and events is None:
            raise ValueError("Images needs a directory: png= for files, events= for TensorBoard, or both.")
        self.draw: Callable[[Any], dict[str, Any]] = draw
        self.png: str | os.PathLike[str] | None = png
        self.events: str | os.PathLike[str] | None = events
        self.when: Cadence | int = when
        self.using: Any = using
        self.name: str | None = name

    def on_run_begin(self, loop: Loop) -> None:
        if isinstance(self.using, Callback):
            loop.carry(self.using)

    def on_step_end(self, loop: Loop) -> None:
        state = loop.state if self.using is None else self.using.apply(loop)
        for name, pictures in self.draw(state).items():
            picture = _grid(_pixels(pictures, name))
            encoded = _encoded(picture)
            if self.png is not None and processes.writes():
                os.makedirs(self.png, exist_ok=True)
                path = os.path.join(self.png, f"step-{loop.step:06d}-{name.replace('/', '-')}.png")
                with open(path, "wb") as file:
                    file.write(encoded)
            if self.events is not None:
                summary = _summary(name, picture.shape, encoded)
                event_files.writer(loop, self.events).file_writer.add_summary(summary, loop.step)

    def on_run_end(self, loop: Loop) -> None:
        if self.events is not None:
            event_files.close(loop, self.events)


def _pixels(pictures: Any, name: str) -> np.ndarray:
    """As uint8, of shape (N, H, W, C)."""
    array = to_host(pictures)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = (np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(
            "Images needs floats or uint8 of shape (H, W, C) or (N, H, W, C), C being 1, 3 or 4, "
            f"got {array.dtype} of shape {array.shape} for {name!r}."
        )
    return array.reshape(-1, *array.shape[-3:])


def _grid(pictures: np.ndarray) -> np.ndarray:
    """One picture of many; places that stay empty are black."""
    n, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    full = np.pad(pictures, [(0, rows * columns - n), (0, 0), (0, 0), (0, 0)])
    full = full.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return full.reshape(rows * height, columns * width, channels)


def _encoded(picture: np.ndarray) -> bytes:
    """A picture as PNG."""
    height, width, channels = picture.shape
    lines = np.pad(picture.reshape(height, -1), [(0, 0), (1, 0)])  # each begins with 0: not filtered
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(lines.tobytes()), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *framed])


def _summary(name: str, shape: tuple[int, ...], encoded: bytes) -> Any:
    """As tensorboardX makes it, which would need Pillow."""
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    height, width, channels = shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=name, image=image)])
