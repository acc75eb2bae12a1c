"""Pass records to a metric writer."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from onstep import Callback, Loop, Record, processes
from onstep.redact import redacted
from onstep.tools import check_signature


@dataclass(eq=False, repr=False)
class Writer(Callback):
    """Passes every record to an object with `write_scalars(step, scalars)`, such as a `clu.metric_writers` writer.

    Use it to log to a tracker that has no callback here: write a class with this one method.

    When the run ends, the writer is flushed if it has a method `flush`. It is not closed. A writer is not told that
    a run resumes, so after a crash it receives the steps since the last checkpoint again.

    Args:
        writer: used in process 0 only.
        config: a dict, dataclass or pydantic model for the writer's `write_hparams`, flat, with secrets redacted.
            It is passed once, when a run starts from scratch.
        name: the callback's name.

    Raises:
        TypeError: the writer has no `write_scalars`, or has no `write_hparams` while `config` is given.

    >>> from onstep import Engine
    >>> from onstep.testing import counting_step
    >>> class Print:
    ...     def write_scalars(self, step, scalars):
    ...         print(step, scalars)
    >>> _ = Engine(counting_step, [Writer(Print())]).run(0, [1, 3], epochs=1)
    2 {'epoch/loss': 2.0}
    2 {'train/loss': 2.0}
    """

    writer: Any
    _: KW_ONLY
    config: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        methods: dict[str, tuple[str, ...]] = {"write_scalars": ("step", "scalars")}
        if self.config is not None:
            methods["write_hparams"] = ("hparams",)
        for method, arguments in methods.items():
            if not callable(getattr(self.writer, method, None)):
                raise TypeError(f"Writer needs an object with {method}, got {type(self.writer).__name__}.")
            check_signature(getattr(self.writer, method), arguments, f"{type(self.writer).__name__}.{method}")
        self.config = None if self.config is None else redacted(self.config)
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
