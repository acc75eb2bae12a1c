"""Summaries for TensorBoard event files, built from tensorboardX's protobuf classes, and read back.

`add_summary(summary, step)` of a `SummaryWriter.file_writer` writes them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any


def scalars_summary(values: dict[str, float]) -> Any:
    """Return all values of a record as one summary.

    One event for all values takes a third of the time of one event for each (`SummaryWriter.add_scalar`).
    """
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])


def image_summary(name: str, shape: tuple[int, ...], png: bytes) -> Any:
    """Return an encoded image as a summary. `SummaryWriter.add_image` would need Pillow.

    Args:
        name: the image's tag.
        shape: height, width, channels.
        png: the encoded image.
    """
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    height, width, channels = shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def hparams_summary(config: dict[str, Any]) -> Any:
    """Return a flat configuration as a summary for TensorBoard's HParams tab.

    The only one of tensorboardX's three summaries that omits the metrics. TensorBoard finds those itself.
    """
    from tensorboardX.summary import hparams

    return hparams({name: "None" if value is None else value for name, value in config.items()}, {})[1]


def written_names(directory: str, step: int) -> set[str]:
    """Return the names of the summaries that the newest event file in a directory has at a step."""
    names = [name for name in os.listdir(directory) if "tfevents" in name] if os.path.isdir(directory) else []
    for name in sorted(names)[-1:]:
        return {
            value.tag
            for event in _events(os.path.join(directory, name))
            if event.step == step
            for value in event.summary.value
        }
    return set()


def _events(path: str) -> Iterator[Any]:
    """Yield the events in a file, whose end may be incomplete.

    Each one is framed by its length (8 bytes), the checksum of that (4), and its own checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]  # made at run time

    with open(path, "rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", header)
            data = file.read(length + 4)
            if len(data) < length + 4:
                return
            yield Event.FromString(data[:-4])
