"""Hand records to Weights & Biases."""

from __future__ import annotations

import glob
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from onstep import Callback, Loop, Record, processes, sinks
from onstep.redact import redacted

EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}  # 255 is what W&B itself says of an interrupt


class WandB(Callback):
    """Logs every record to a run of Weights & Biases; needs `pip install 'onstep[wandb]'`.

    The run begins with the first record and ends as finished, failed or killed (by a signal, or
    stopped to be resumed). Its id is in the checkpoint: a run that goes on continues it, and what W&B
    holds of a step stands and is not logged again. Offline each sitting leaves a folder of its own,
    for `wandb sync`, and W&B writes every 15 seconds: a process that is killed may lose as much.

    Args:
        project, tags: of the run.
        run_name: what W&B shall call it.
        config: a dict, dataclass or pydantic model, logged flat, with secrets redacted.
        name: the callback's name.
        init: more arguments of `wandb.init`, such as `mode="offline"`, `dir`, `group`. Without
            `settings` of yours, command line and machine are not sent.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        run_name: str | None = None,
        tags: Sequence[str] = (),
        config: Any = None,
        name: str | None = None,
        **init: Any,
    ):
        sinks.needs("WandB", "wandb")
        self.name: str | None = name
        self._given = init.pop("id", None)
        self._options: dict[str, Any] = {"settings": {"x_disable_meta": True}, **init}
        self._options |= {"project": project, "name": run_name, "tags": list(tags), "resume": "allow"}
        self._options["config"] = None if config is None else redacted(config)
        self._id: str | None = None
        self._run: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        self._id = self._id or self._given or uuid.uuid4().hex[:8]

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        if self._run is None:
            import wandb

            self._run = wandb.init(id=self._id, **self._options)
            self._first = self._run.starting_step
            if self._run.offline:  # where nobody knows but the folders of earlier sittings
                folders = os.path.join(glob.escape(self._run.dir), "..", "..", f"offline-run-*-{self._id}*")
                files = os.path.join(folders, f"run-{self._id}.wandb")
                self._first = max((step + 1 for path in glob.glob(files) for step in _steps(path)), default=0)
        if record.step >= self._first:
            self._run.log(record.values, step=record.step)

    def on_run_end(self, loop: Loop) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=EXIT_CODES[sinks.ended(loop)])

    def get_state(self) -> dict[str, Any]:
        return {"id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        self._id = state["id"]


def _steps(path: str) -> Iterator[int]:
    """The steps in W&B's file of a run: records of protobuf in LevelDB's log format, which may be torn.

    github.com/google/leveldb/blob/main/doc/log_format.md, after a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record as Entry  # type: ignore[attr-defined]

    with open(path, "rb") as file:
        data = file.read()
    at, entry = 7, b""
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<4xHB", data, at)
        entry, at = entry + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            found = Entry.FromString(entry)
            entry = b""
            if found.HasField("history"):
                yield found.history.step.num
