"""Log records to Weights & Biases."""

from __future__ import annotations

import glob
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from onstep import Callback, Loop, Record, processes
from onstep.redact import redacted
from onstep.tools import check_list, check_package, exit_status, local_path

EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}  # W&B itself reports 255 for an interrupt

_begun: set[str] = set()
"""The ids of the W&B runs that callbacks in this process have begun and not ended."""


class WandB(Callback):
    """Logs every record to a Weights & Biases run. Needs `pip install wandb`.

    The W&B run begins with the first record, and ends as finished, failed or killed (by a signal or a
    resumable stop). Checkpoints hold its id, so a resumed run continues the same W&B run. Steps that W&B already has
    are not logged again.

    If you have called `wandb.init` yourself, the records go to your run, which stays open; `config` is added to its
    configuration, and the other arguments are not used. Your own calls of `wandb.log` may advance W&B's step beyond
    that of the run; records are then logged at W&B's step.

    Offline, each session leaves a folder for `wandb sync`. W&B writes these files every 15 seconds, so a process that
    is killed may lose the records of its last 15 seconds.

    Args:
        project: the W&B project.
        run_name: the name of the W&B run.
        tags: the tags of the W&B run.
        config: a dict, dataclass or pydantic model, logged flat, with secrets redacted.
        name: the callback's name.
        init: more arguments of `wandb.init`, such as `mode="offline"`, `dir` or `group`. Unless you give `settings`,
            the command line and details of the machine are not sent.

    Raises:
        ImportError: wandb is not installed.
        ValueError: `tags` is one string, or `dir` is a URL.

    >>> WandB("digits", tags=["baseline"], config={"rate": 0.1, "api_key": "sk-1"}, mode="offline")
    WandB(project='digits', tags=('baseline',), config={'api_key': '***', 'rate': 0.1})
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
        check_package("WandB", "wandb")
        check_list("WandB", "tags", tags)
        if init.get("dir") is not None:
            init["dir"] = local_path("WandB", init["dir"])
        self.project: str | None = project
        self.run_name: str | None = run_name
        self.tags: tuple[str, ...] = tuple(tags)
        self.config: dict[str, Any] | None = None if config is None else redacted(config)
        self.name: str | None = name
        self._given_id = init.pop("id", None)
        self._options: dict[str, Any] = {"settings": {"x_disable_meta": True}, **init}
        self._options |= {"project": project, "name": run_name, "tags": list(tags), "resume": "allow"}
        self._options["config"] = self.config
        self._id: str | None = None
        self._run: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        self._id = self._id or self._given_id or uuid.uuid4().hex[:8]

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        run = self._run or self._begin()
        if record.step >= self._next:
            taken = self._yours and record.step < run.step  # W&B would ignore the values
            run.log(record.values, step=None if taken else record.step)

    def on_run_end(self, loop: Loop) -> None:
        run, self._run = self._run, None
        if run is not None and not self._yours:
            _begun.discard(run.id)
            run.finish(exit_code=EXIT_CODES[exit_status(loop)])

    def get_state(self) -> dict[str, Any]:
        return {"id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def _begin(self) -> Any:
        """Find and return the user's W&B run, or begin one beside those of other callbacks."""
        import wandb

        run = wandb.run
        if run is None or run.id in _begun:
            new = {"reinit": "create_new"} if _begun else {}  # W&B would return the run of another callback
            run = wandb.init(id=self._id, **new, **self._options)
        self._run, self._yours = run, run.id != self._id
        if self._yours:
            self._id, self._next = run.id, run.starting_step if run.resumed else 0
            run.config.update(self.config or {}, allow_val_change=True)
            return run
        _begun.add(run.id)
        self._next = run.starting_step
        if run.offline:  # there is no server to ask, only the folders of earlier sessions
            folders = os.path.join(glob.escape(run.dir), "..", "..", f"offline-run-*-{self._id}*")
            files = os.path.join(folders, f"run-{self._id}.wandb")
            self._next = max((step + 1 for path in glob.glob(files) for step in _logged_steps(path)), default=0)
        return run


def _logged_steps(path: str) -> Iterator[int]:
    """Yield the steps in the file of an offline W&B run, whose end may be incomplete.

    The file begins with a header of 7 bytes. It is followed by protobuf records in LevelDB's log format:
    https://github.com/google/leveldb/blob/main/doc/log_format.md
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
        if kind in (1, 4) and at <= len(data):  # a full record, or the last part of one
            found = Entry.FromString(entry)
            entry = b""
            if found.HasField("history"):
                yield found.history.step.num
