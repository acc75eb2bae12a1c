"""Hand records to a metric writer."""

from __future__ import annotations

from typing import Any

from onstep import Callback, Loop, Record, processes
from onstep.redact import redacted


class Writer(Callback):
    """Hands every record to an object with `write_scalars(step, scalars)`, such as those of `clu.metric_writers`.

    When the run ends it flushes the writer, where it has `flush`; whoever made the writer closes it. A
    writer does not learn that a run goes on: what a killed process wrote beyond the step of its last
    checkpoint it is given again.

    Args:
        writer: used in process 0 alone.
        config: a dict, dataclass or pydantic model for the writer's `write_hparams`, once, when a run
            begins; flat, with secrets redacted.
        name: the callback's name.

    Raises:
        TypeError: the writer has no `write_scalars`; or no `write_hparams`, and there is a `config`.
    """

    def __init__(self, writer: Any, *, config: Any = None, name: str | None = None):
        for method in ["write_scalars"] + ["write_hparams"] * (config is not None):
            if not callable(getattr(writer, method, None)):
                raise TypeError(f"Writer needs an object with {method}, got {type(writer).__name__}.")
        self.writer: Any = writer
        self.name: str | None = name
        self.config: dict[str, Any] | None = None if config is None else redacted(config)
        self._begun = False

    def on_run_begin(self, loop: Loop) -> None:
        self._begun = loop.step > 0

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        if self.config is not None and not self._begun:
            self.writer.write_hparams(self.config)
        self._begun = True
        self.writer.write_scalars(record.step, record.values)

    def on_run_end(self, loop: Loop) -> None:
        if processes.writes() and hasattr(self.writer, "flush"):
            self.writer.flush()
