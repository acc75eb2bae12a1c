"""Write images that are drawn from the state: PNG files and TensorBoard."""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Loop, every, processes
from onstep.tools import check_signature, close_event_writer, event_writer, local_path, to_host

from ._support.event_files import image_summary

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
"""What a file name may not contain on every system."""


@dataclass(eq=False, repr=False)
class Images(Callback):
    """Draws images from the state, such as samples of a generative model, and writes them to files.

    Several images of one name become one image, a roughly square grid filled row by row.

    Args:
        draw: `state -> {name: images}`. Shape (H, W, C) or (N, H, W, C) with C = 1, 3 or 4 channels; uint8, or floats
            in [0, 1]. Floats outside that range are clipped, and NaN becomes 0.
        png: a directory for files such as `step-001000-samples.png`.
        events: a directory for TensorBoard, which may be the same as that of `TensorBoard`.
        when: when to draw; a plain int means steps.
        using: a callback whose `apply(loop)` returns the state to draw from, such as `using=ema`.
        name: the callback's name.

    Raises:
        TypeError: `draw` is not a function.
        ValueError: no directory is given, or a URL; `using` is not among the run's callbacks (raised when the run
            begins); or `draw` returns an array of another shape or dtype (raised when it is drawn).

    >>> import tempfile
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> def draw(state):
    ...     return {"grey": jnp.full((8, 8, 1), state / 4)}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Engine(counting_step, [Images(draw, png=directory)]).run(0, [1, 1], epochs=2)
    ...     sorted(os.listdir(directory))
    ['step-000002-grey.png', 'step-000004-grey.png']
    """

    draw: Callable[[Any], dict[str, Any]]
    _: KW_ONLY
    png: str | os.PathLike[str] | None = None
    events: str | os.PathLike[str] | None = None
    when: Cadence | int = every(epochs=1)  # noqa: RUF009 (frozen)
    using: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.png is None and self.events is None:
            raise ValueError("Images needs a directory: png= for files, events= for TensorBoard, or both.")
        if not callable(self.draw):
            raise TypeError(f"Images needs a function state -> images, got {type(self.draw).__name__}.")
        check_signature(self.draw, ("state",), "The function of Images")
        if self.using is not None and not callable(getattr(self.using, "apply", None)):
            raise TypeError(f"Images needs using= to have apply(loop), such as an EMA, got {self.using!r:.80}.")
        self._png = None if self.png is None else local_path("Images", self.png)
        self._events = None if self.events is None else local_path("Images", self.events)

    def on_run_begin(self, loop: Loop) -> None:
        if isinstance(self.using, Callback):
            loop.carry(self.using)

    def on_step_end(self, loop: Loop) -> None:
        state = loop.state if self.using is None else self.using.apply(loop)
        for name, images in self.draw(state).items():
            image = _grid(_pixels(images, name))
            png = _png(image)
            if self._png is not None and processes.writes():
                os.makedirs(self._png, exist_ok=True)
                path = os.path.join(self._png, f"step-{loop.step:06d}-{_FORBIDDEN.sub('-', name)}.png")
                with open(path, "wb") as file:
                    file.write(png)
            if self._events is not None:
                summary = image_summary(name, image.shape, png)
                event_writer(loop, self._events).file_writer.add_summary(summary, loop.step)

    def on_run_end(self, loop: Loop) -> None:
        if self._events is not None:
            close_event_writer(loop, self._events)


def _pixels(images: Any, name: str) -> np.ndarray:
    """Return the images as uint8 of shape (N, H, W, C)."""
    array = to_host(images)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = (np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(
            "Images needs floats or uint8 of shape (H, W, C) or (N, H, W, C) with C = 1, 3 or 4, "
            f"got {array.dtype} of shape {array.shape} for {name!r}."
        )
    return array.reshape(-1, *array.shape[-3:])


def _grid(images: np.ndarray) -> np.ndarray:
    """Return one image of shape (H, W, C) that holds all of them; unused cells are black."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    full = np.pad(images, [(0, rows * columns - n), (0, 0), (0, 0), (0, 0)])
    full = full.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return full.reshape(rows * height, columns * width, channels)


def _png(image: np.ndarray) -> bytes:
    """Encode an image as PNG, without Pillow, which would be another dependency."""
    height, width, channels = image.shape
    lines = np.pad(image.reshape(height, -1), [(0, 0), (1, 0)])  # each line begins with 0, which means "no filter"
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(lines.tobytes()), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *framed])
