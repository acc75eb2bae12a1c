"""Hand records to MLflow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from onstep import Callback, Loop, Record, processes, sinks
from onstep.redact import redacted

TAG = "onstep.run"
"""Of an MLflow run: by it a run that goes on finds its own."""


class MLflow(Callback):
    """Logs every record to an MLflow run; needs `pip install 'onstep[mlflow]'`.

    The run begins with the first record and ends as FINISHED, FAILED or KILLED (by a signal, or
    stopped to be resumed). What identifies it is in the checkpoint: a run that goes on continues it,
    and points that MLflow holds stand and are not logged again. The extra brings `mlflow-skinny`, which is
    enough for a tracking server; a database on this machine needs the whole of `mlflow`.

    Args:
        experiment: made where it does not exist.
        run_name, tags: of the run.
        config: a dict, dataclass or pydantic model, logged as parameters, flat, with secrets redacted.
        tracking_uri: the store, such as `"http://host:5000"`; MLflow's own choice without.
        name: the callback's name.

    Raises:
        ImportError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "Default",
        *,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        config: Any = None,
        tracking_uri: str | None = None,
        name: str | None = None,
    ):
        sinks.needs("MLflow", "mlflow")
        self.experiment: str = experiment
        self.run_name: str | None = run_name
        self.tags: dict[str, str] = dict(tags or {})
        self.config: dict[str, Any] = {} if config is None else redacted(config)
        self.tracking_uri: str | None = tracking_uri
        self.name: str | None = name
        self._id: str | None = None
        self._client: Any = None

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
            for name, value in record.values.items()
            if not self._continued or record.step > self._newest(name)
        ]
        for start in range(0, len(new), 1000):  # the most that MLflow takes at once
            self._client.log_batch(self._run, metrics=new[start : start + 1000])

    def on_run_end(self, loop: Loop) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self._run, sinks.ended(loop).upper())

    def get_state(self) -> dict[str, Any]:
        return {"id": self._id}

    def set_state(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def _begin(self) -> Any:
        """Finds the run that goes on, or makes a new one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self.tracking_uri)
        known = client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else client.create_experiment(self.experiment)
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{self._id}'")
        self._continued, self._last = bool(found), dict[str, int]()
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(
                experiment, run_name=self.run_name, tags=self.tags | {TAG: self._id}
            ).info.run_id
            params = [Param(name, str(value)) for name, value in self.config.items()]
            for start in range(0, len(params), 100):  # the most that MLflow takes at once
                client.log_batch(self._run, params=params[start : start + 100])
        return client

    def _newest(self, name: str) -> int:
        """The newest step of a metric that an earlier process logged, -1 if there is none."""
        if name not in self._last:
            points = self._client.get_metric_history(self._run, name)
            self._last[name] = max((point.step for point in points), default=-1)
        return self._last[name]
