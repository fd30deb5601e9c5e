"""MLflow: on the server that MLFLOW_TRACKING_URI names, else in the run directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lte_ray.run.sinks.protocol import LogRow, RunInfo, Status

T = TypeVar("T")

EXPERIMENT = "lte-ray"
"""The experiment unless MLFLOW_EXPERIMENT_NAME names another."""

RUN_TAG = "lte_ray.run"
"""The tag by which a resumed run finds its MLflow run."""

MAX_VALUE = 500
"""Characters of a setting, which every MLflow server takes."""

MAX_METRICS, MAX_PARAMETERS = 1000, 100
"""Items of one request, as MLflow limits them."""

MAX_EVENTS = 1000
"""Events in the artifact ``events.txt``: the newest."""

ENDED: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MlflowSink:
    """Logs figures as metrics, settings as parameters, the environment as tags, and events as ``events.txt``."""

    def open(self, run: RunInfo) -> None:
        """Starts the MLflow run, or continues the one with this run's id.

        MLflow can't change parameters, so settings that a resumed run has changed become tags.
        """
        import mlflow
        from mlflow.entities import Param, RunTag

        self._client: Any = mlflow.MlflowClient(_tracking_uri(run.folder))
        self._events: list[str] = []
        experiment, known = self._experiment(), {}
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            known = dict(found[0].data.params)
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=run.name, tags={RUN_TAG: run.id}).info.run_id
        settings = dict(_flatten("", run.config))
        new = [Param(name, value) for name, value in settings.items() if name not in known]
        tags = {f"changed.{name}": value for name, value in settings.items() if known.get(name, value) != value}
        tags |= {f"environment.{name}": value for name, value in _flatten("", run.environment)}
        for some in _chunks(new, MAX_PARAMETERS):
            self._client.log_batch(self._id, params=some)
        for some_tags in _chunks([RunTag(name, value) for name, value in tags.items()], MAX_PARAMETERS):
            self._client.log_batch(self._id, tags=some_tags)

    def row(self, row: LogRow) -> None:
        from mlflow.entities import Metric

        if row.kind == "event":
            self._events = [*self._events[1 - MAX_EVENTS :], row.text]
        at = int(row.at * 1000)
        metrics = [Metric(_metric_name(name), value, at, row.step) for name, value in row.figures.items()]
        for some in _chunks(metrics, MAX_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def close(self, status: Status) -> None:
        try:
            if self._events:
                self._client.log_text(self._id, "\n".join(self._events) + "\n", "events.txt")
        finally:
            self._client.set_terminated(self._id, ENDED[status])

    def _experiment(self) -> str:
        """Returns the experiment's id, after making it if it doesn't exist."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))


def _tracking_uri(folder: Path) -> str | None:
    """Returns None if the user names a server, else a database in `folder`, or files there with mlflow-skinny only."""
    import mlflow

    if mlflow.is_tracking_uri_set():
        return None
    if find_spec("sqlalchemy") and find_spec("alembic"):
        return f"sqlite:///{folder}/mlflow.db"
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for that
    return f"file:{folder}"


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}{name}.", value)
        else:
            yield _valid(f"{prefix}{name}"), str(value)[:MAX_VALUE]


def _metric_name(name: str) -> str:
    """``train/loss/head_0`` as ``train/loss.head_0``: MLflow may keep ``train/loss`` in a file, which can't be a folder."""
    group, slash, rest = name.partition("/")
    return _valid(group + slash + rest.replace("/", "."))


def _valid(name: str) -> str:
    """A name with only those characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
