"""Callbacks of Ray Train (`ray.train.RunConfig(callbacks=[...])`), called as those of lte-ray."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import ray.train

from lte_ray.checkpoint import version_folder
from lte_ray.errors import ConfigError, RunError
from lte_ray.run.callbacks import Callback, Run
from lte_ray.run.metrics import Row
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class RayRunContext:
    """What Ray's callbacks get of the run: that of Ray's `TrainRunContext` which a run here has, too."""

    run_config: ray.train.RunConfig
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def get_run_config(self) -> ray.train.RunConfig:
        """Returns the run's configuration."""
        return self.run_config


class RayCallback(Callback):
    """Passes on to a `ray.train.UserCallback`.

    Each merge and each evaluation is a report, as of one worker: with the mean training loss and the worker's figures, or with
    the evaluation's. A checkpoint is a report of the newest of these. Each failure of heads, and an error that ends the run, is
    an exception.

    Args:
        callback: Ray's.
        context: of the run.
        directory: of the run, where its checkpoints are.
    """

    def __init__(self, callback: Any, context: RayRunContext, directory: RunDirectory) -> None:
        self._callback, self._context, self._directory = callback, context, directory
        self._newest: dict[str, Any] = {}
        self._reported_end = False

    @property
    def label(self) -> str:
        return type(self._callback).__name__

    def on_merge(self, run: Run, row: Row) -> None:
        figures = {name: _mean(values) for name, values in row.get("figures", {}).items()}
        counts = {name: row[name] for name in ("version", "step", "samples")}
        self._report({**figures, "train_loss": _mean(row["train_loss"]), **counts})

    def on_evaluation(self, run: Run, row: Row) -> None:
        self._report({**row["values"], "version": row["version"], "step": row["step"]})

    def on_checkpoint(self, run: Run, version: int) -> None:
        path = self._directory.path_to(version_folder(version))
        self._report(self._newest, ray.train.Checkpoint(path, self._directory.filesystem))

    def on_failure(self, run: Run, row: Row) -> None:
        if row["event"] in ("head_lost", "head_hung"):
            self._reported_end = row.get("remedy") == "stop"
            self._fail({head: RunError(str(row.get("why", ""))) for head in row["heads"]})

    def on_run_end(self, run: Run, outcome: Any) -> None:
        if isinstance(outcome, Exception) and not self._reported_end:
            self._fail({0: outcome})

    def _report(self, metrics: dict[str, Any], checkpoint: ray.train.Checkpoint | None = None) -> None:
        self._newest = metrics
        self._callback.after_report(run_context=self._context, metrics=[dict(metrics)], checkpoint=checkpoint)

    def _fail(self, errors: dict[int, Exception]) -> None:
        self._callback.after_exception(run_context=self._context, worker_exceptions=errors)


def adapt_callbacks(config: ray.train.RunConfig, directory: RunDirectory) -> list[Callback]:
    """Returns the callbacks of Ray's RunConfig, adapted.

    Raises:
        ConfigError: one isn't a `ray.train.UserCallback`.
    """
    for each in config.callbacks:
        if not isinstance(each, ray.train.UserCallback):
            raise ConfigError(
                f"RunConfig(callbacks=[{type(each).__name__}]) would have no effect: LTETrainer calls ray.train.UserCallback "
                "only. Derive it from that or from lte_ray.Callback, and give the latter as LTETrainer(callbacks=[...])."
            )
    context = RayRunContext(config)
    return [RayCallback(each, context, directory) for each in config.callbacks]


def _mean(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None
