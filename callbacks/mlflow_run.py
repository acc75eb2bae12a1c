"""Log records to MLflow."""

from __future__ import annotations

import copy
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from onstep import Callback, Loop, Record, processes
from onstep.redact import redacted, without_secrets
from onstep.tools import check_package, exit_status, local_path

TAG = "onstep.run"
"""The tag of an MLflow run by which a resumed run finds it."""


@dataclass(eq=False, repr=False)
class MLflow(Callback):
    """Logs every record to an MLflow run. Needs `pip install mlflow`.

    The MLflow run begins with the first record, and ends as FINISHED, FAILED or KILLED (by a signal or a
    resumable stop). Checkpoints hold its id, so a resumed run continues the same MLflow run. Points that MLflow
    already has are not logged again. Characters that MLflow does not allow in names become `_`: `top@5` is `top_5`.

    The extra installs `mlflow-skinny`, which is enough for a tracking server. A database on this machine needs the
    full `mlflow` package.

    Args:
        experiment: the MLflow experiment, which is created if it does not exist.
        run_name: the name of the MLflow run.
        tags: the tags of the MLflow run.
        config: a dict, dataclass or pydantic model, logged as parameters, flat, with secrets redacted.
        tracking_uri: where MLflow stores runs, such as `"http://host:5000"`; MLflow's own default if not given.
        name: the callback's name.

    Raises:
        ImportError: MLflow is not installed.

    >>> MLflow("digits", config={"rate": 0.1, "api_key": "sk-1"}, tracking_uri="https://me:1234@host")
    MLflow(experiment='digits', config={'api_key': '***', 'rate': 0.1}, tracking_uri='https://***@host')
    """

    experiment: str = "Default"
    _: KW_ONLY
    run_name: str | None = None
    tags: Mapping[str, str] | None = None
    config: Any = None
    tracking_uri: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_package("MLflow", "mlflow")
        self.config = None if self.config is None else redacted(self.config)
        self._uri = self.tracking_uri
        if self._uri and ":" not in self._uri and self._uri not in ("databricks", "databricks-uc", "uc"):  # a directory
            self._uri = local_path("MLflow", self._uri)
        self._id: str | None = None
        self._client: Any = None

    def __repr__(self) -> str:
        shown = copy.copy(self)
        shown.tracking_uri = self.tracking_uri and without_secrets(self.tracking_uri)  # it may hold a password
        return super(MLflow, shown).__repr__()

    def on_run_begin(self, loop: Loop) -> None:
        self._id = self._id or uuid.uuid4().hex

    def on_log(self, loop: Loop, record: Record) -> None:
        if not processes.writes():
            return
        from mlflow.entities import Metric

        if self._client is None:
            self._client = self._begin()
        now = int(time.time() * 1000)
        new = [
            Metric(name, value, now, record.step)
            for name, value in zip(self._names(record.values), record.values.values(), strict=True)
            if not self._continued or record.step > self._newest_step(name)
        ]
        for start in range(0, len(new), 1000):  # MLflow's limit per call
            self._client.log_batch(self._run, metrics=new[start : start + 1000])

    def on_run_end(self, loop: Loop) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self._run, exit_status(loop).upper())

    def get_state(self) -> dict[str, Any]:
        return {"id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def _begin(self) -> Any:
        """Find the MLflow run to continue, or create one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._uri)
        known = client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else client.create_experiment(self.experiment)
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{self._id}'")
        self._continued, self._newest, self._names = bool(found), dict[str, int](), _Names()
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(
                experiment, run_name=self.run_name, tags={**(self.tags or {}), TAG: self._id}
            ).info.run_id
            config = self.config or {}
            params = [Param(name, str(value)) for name, value in zip(_Names()(config), config.values(), strict=True)]
            for start in range(0, len(params), 100):  # MLflow's limit per call
                client.log_batch(self._run, params=params[start : start + 100])
        return client

    def _newest_step(self, name: str) -> int:
        """Return the last step of a metric that an earlier session logged, or -1."""
        if name not in self._newest:
            points = self._client.get_metric_history(self._run, name)
            self._newest[name] = max((point.step for point in points), default=-1)
        return self._newest[name]


class _Names:
    """Names that MLflow accepts, a different one for each name of a record."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}

    def __call__(self, names: Iterable[str]) -> list[str]:
        """Return the names under which MLflow gets values with these names."""
        for name in names:
            if name not in self._by_name:
                plain, taken = _plain(name), set(self._by_name.values())
                numbered = (f"{plain[:240]}_{n}" for n in itertools.count(2))
                self._by_name[name] = next(n for n in itertools.chain([plain], numbered) if n not in taken)
        return [self._by_name[name] for name in names]


def _plain(name: str) -> str:
    """Return a name that MLflow accepts, similar to the given one.

    >>> _plain("top@5"), _plain("/timing(s)//../a"), _plain("loss->acc")
    ('top_5', 'timing_s_/a', 'loss-_acc')
    """
    allowed = re.sub(r"[^/\w.\- ]" if os.name == "nt" else r"[^/\w.\- :]", "_", name)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]  # a name may become a path
    return "/".join(parts)[:250] or "_"
