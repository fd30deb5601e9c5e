"""The actor of a trial: the driver of an ordinary run, which the sweep asks how far it is."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from lte_ray.errors import LTEError
from lte_ray.ladder import Point
from lte_ray.run.callbacks import Callback, Run
from lte_ray.run.history import read_rows
from lte_ray.run.metrics import Progress as RunProgress
from lte_ray.run.metrics import Row
from lte_ray.runtime.context import PickledObject
from lte_ray.storage import RunDirectory
from lte_ray.sweep.engine import Progress, failed_result
from lte_ray.sweep.trials import Trial, TrialResult, TrialSettings
from lte_ray.trainer import LTETrainer


@dataclass(frozen=True)
class TrialTask:
    """What the actor of a trial gets.

    Attributes:
        trial: to train.
        settings: of its run; `settings.worker` is None.
        worker: the worker.
        program: how ``run.toml`` names the worker.
        place: folder or URI of the sweep, where the run gets its directory.
        folder: the current folder of the sweep's process, to which paths in settings are relative.
    """

    trial: Trial
    settings: TrialSettings
    worker: PickledObject
    program: str
    place: str
    folder: str


class TrialActor:
    """Trains one trial."""

    def __init__(self, task: TrialTask) -> None:
        self._task, self._follower = task, Follower()
        self._interrupted = threading.Event()
        self._step = 0
        self._notes = _Notes()

    def run(self) -> TrialResult | None:
        """Trains to the end, and returns what it gave; None if it was interrupted."""
        task, started = self._task, time.monotonic()
        log = logging.getLogger("lte_ray")
        log.addHandler(self._notes)
        log.propagate = False
        if os.path.isdir(task.folder):
            os.chdir(task.folder)
        try:
            metrics = self._train(task)
        except KeyboardInterrupt:
            return None
        except LTEError as error:
            return self._fail(error, started)
        trial, stopped = task.trial, metrics.get("stopped") or {}
        reason = str(stopped.get("reason", "")) if stopped.get("kind") == "request" else ""
        sent = 0 if task.settings.train.baseline else metrics["bytes_up"] + metrics["bytes_down"]
        seconds, points = time.monotonic() - started, self._follower.points()
        return TrialResult(
            trial.key, trial.name, trial.number, dict(trial.values), trial.seed, points, seconds, sent, stopped=reason
        )

    def _train(self, task: TrialTask) -> dict[str, Any]:
        settings, name = task.settings, task.trial.name
        worker = task.worker.load()
        directory = RunDirectory.open(task.place, name, patience=settings.storage.storage_patience)
        self._follower.directory = directory
        storage = replace(settings.storage, name=name, storage=task.place, resume=directory.exists(), overwrite=False)
        trainer = LTETrainer(
            worker,
            settings.lte,
            settings.merge,
            settings.train,
            settings.placement,
            storage,
            settings.failure,
            reporter=self,
            program=task.program,
            callbacks=[self._follower],
        )
        return dict(trainer.fit().metrics or {})

    def _fail(self, error: LTEError, started: float) -> TrialResult:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"
        return failed_result(self._task.trial, why, self._follower.points(), time.monotonic() - started)

    # -- a reporter of the run ---------------------------------------------------------------------------------------------

    def update(self, progress: RunProgress) -> None:
        """Records how far the run is. Interrupts it if the sweep is interrupted: then it saves at once."""
        self._step = progress.step
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    def close(self) -> None:
        """There is nothing to close."""

    # -- called by the sweep -----------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def poll(self, points: int, notes: int) -> Progress:
        """Returns what has happened, without as many evaluations and warnings as the sweep has seen."""
        return Progress(self._step, self._follower.points()[points:], self._notes.texts[notes:])

    @ray.method(concurrency_group="ctl")
    def stop(self, reason: str) -> None:
        """Ends the run after the merge under way."""
        self._follower.stop(reason)

    @ray.method(concurrency_group="ctl")
    def interrupt(self) -> None:
        """Ends the run as Ctrl-C does: it writes a checkpoint, as far as the time allows."""
        self._interrupted.set()


class Follower(Callback):
    """Collects the evaluations of a run, those before it was resumed, too."""

    def __init__(self) -> None:
        self.directory: RunDirectory | None = None
        self._run: Run | None = None
        self._reason = ""
        self._lock = threading.Lock()
        self._samples: dict[int, int] = {}
        self._evaluations: dict[int, tuple[int, dict[str, float]]] = {}

    def on_run_start(self, run: Run) -> None:
        for row in read_rows(self.directory) if self.directory is not None else ():
            self._add(row)
        with self._lock:
            self._run = run
        if self._reason:
            run.stop(self._reason)

    def on_merge(self, run: Run, row: Row) -> None:
        self._add(row)

    def on_evaluation(self, run: Run, row: Row) -> None:
        self._add(row)

    def _add(self, row: Row) -> None:
        with self._lock:
            if row["kind"] == "merge":
                self._samples[row["version"]] = row["samples"]
            elif row["kind"] == "evaluation" and row["version"]:  # not of the untrained model
                figures = {name: float("nan") if value is None else value for name, value in row["values"].items()}
                self._evaluations[row["version"]] = (row["step"], figures)

    def stop(self, reason: str) -> None:
        """Ends the run, or lets it end once it begins."""
        with self._lock:
            self._reason, run = reason, self._run
        if run is not None:
            run.stop(reason)

    def points(self) -> tuple[Point, ...]:
        """The evaluations so far."""
        with self._lock:
            evaluations, samples = sorted(self._evaluations.items()), dict(self._samples)
        return tuple(
            Point(step, sum(number for version, number in samples.items() if version <= evaluated), figures)
            for evaluated, (step, figures) in evaluations
        )


class _Notes(logging.Handler):
    """Keeps the warnings of a run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self.texts.append(record.getMessage())
