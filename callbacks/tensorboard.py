"""Write records as TensorBoard event files."""

from __future__ import annotations

import numbers
import os
from dataclasses import KW_ONLY, dataclass
from typing import Any

from onstep import Callback, Loop, Record
from onstep.redact import redacted
from onstep.tools import close_event_writer, event_writer, local_path

from ._support.event_files import hparams_summary, scalars_summary, written_names


@dataclass(eq=False, repr=False)
class TensorBoard(Callback):
    """Writes every record to TensorBoard event files, with tensorboardX.

    The first file is created at the first record. Use one directory per run. When a run resumes, TensorBoard hides
    the points that an earlier session wrote beyond the step from which it resumes; they stay in the files.

    Args:
        directory: as for `tensorboard --logdir`.
        config: a dict, dataclass or pydantic model for the HParams tab, flat, with secrets redacted.
        flush_seconds: seconds between two fsyncs of the file. Points are written immediately, so only a crash of
            the machine can lose those since the last fsync.
        name: the callback's name.

    Raises:
        ValueError: `directory` is a URL, or `flush_seconds` is negative.

    >>> import tempfile
    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Engine(counting_step, [TensorBoard(directory)]).run(0, [1, 3], epochs=1)
    ...     os.listdir(directory)
    ['events.out.tfevents...']
    """

    directory: str | os.PathLike[str]
    _: KW_ONLY
    config: Any = None
    flush_seconds: int = 10
    name: str | None = None

    def __post_init__(self) -> None:
        self._path = local_path("TensorBoard", self.directory)
        if not isinstance(self.flush_seconds, numbers.Real) or not self.flush_seconds >= 0:
            raise ValueError(f"TensorBoard needs flush_seconds >= 0, got {self.flush_seconds!r}.")
        self.config = None if self.config is None else redacted(self.config)
        self._configured = False

    def on_run_begin(self, loop: Loop) -> None:
        self._configured = False

    def on_log(self, loop: Loop, record: Record) -> None:
        if loop.step == loop.start_step > 0 and record.values.keys() <= written_names(self._path, record.step):
            return  # a run that resumes at its target repeats its last record
        writer = event_writer(loop, self._path, flush_seconds=self.flush_seconds).file_writer
        if self.config is not None and not self._configured:
            writer.add_summary(hparams_summary(self.config), 0)
            self._configured = True
        writer.add_summary(scalars_summary(record.values), record.step)

    def on_run_end(self, loop: Loop) -> None:
        close_event_writer(loop, self._path)
