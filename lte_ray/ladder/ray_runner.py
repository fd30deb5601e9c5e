"""Runs one arm on Ray: heads are actors, as in `lte-ray train`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from lte_ray.config import FailureConfig, PlacementConfig, StorageConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import CoordinatorLost, HeadLost, RunError, WorkerFailed
from lte_ray.ladder.arms import Arm
from lte_ray.ladder.results import ArmResult, Point
from lte_ray.ladder.runner import Listener, ignore, ordinary_ddp, train_multihead
from lte_ray.run.metrics import Progress
from lte_ray.run.metrics_files import MetricsReader
from lte_ray.runtime import placement as placing
from lte_ray.runtime.context import PickledObject
from lte_ray.runtime.ray_errors import to_lte_error
from lte_ray.storage import RunDirectory, split_run_path
from lte_ray.trainer import LTETrainer
from lte_ray.worker import Worker

ARMS = "arms"
"""Folder of the runs in the folder of the ladder."""


@dataclass(frozen=True)
class RayRunner:
    """Runs arms on the connected Ray. Each is a run of its own in the ladder's folder, and continues if it was interrupted.

    Evaluations that are due while the evaluator is behind are left out, except the last.

    Args:
        worker: of the comparison.
        program: how ``run.toml`` names it.
        directory: of the ladder.
        placement, failure: as for a run.
        storage: of the ladder.
    """

    worker: Worker
    program: str
    directory: RunDirectory
    placement: PlacementConfig
    failure: FailureConfig
    storage: StorageConfig

    def __call__(self, arm: Arm, listener: Listener = ignore) -> ArmResult:
        """Trains the arm to its end. A run that ends early because its contributions were refused has failed.

        Raises:
            LTEError: as `LTETrainer.fit`.
        """
        started, worker = time.monotonic(), arm.make_worker(self.worker)
        points, sent, ddp, failed = [], 0, 0, ""
        try:
            if arm.mode == "mhlora":
                for step, point in self._train_multihead(worker, arm):
                    listener(arm, step, point)
                    points += [point] if point else []
            else:
                points, sent, ddp = self._train_heads(worker, arm, listener)
        except (WorkerFailed, HeadLost, CoordinatorLost):
            raise
        except RunError as error:
            failed = str(error).splitlines()[0]
        seconds = time.monotonic() - started
        return ArmResult(arm.key, arm.rung, arm.rate, arm.seed, tuple(points), seconds, sent, ddp, failed)

    def _train_heads(self, worker: Worker, arm: Arm, listener: Listener) -> tuple[list[Point], int, int]:
        name, heads = f"{arm.settings.run}-{arm.key[:6]}", arm.lte.num_heads
        merges_a_round = 1 if arm.train.baseline or arm.merge.when == "barrier" else heads
        every = max(1, arm.evaluate_every // arm.merge.merge_iter) * merges_a_round if arm.evaluate_every else 0
        uri = self.storage.storage or ""
        place = _inside(uri, self.directory) if "://" in uri else self.directory.path_to(ARMS)
        directory = RunDirectory.open(place, name, patience=self.directory.patience)
        storage = StorageConfig(
            name,
            place,
            keep_checkpoints=1,
            resume=directory.exists(),
            storage_patience=self.storage.storage_patience,
            log=self.storage.log,
        )
        trainer = LTETrainer(
            worker,
            arm.lte,
            arm.merge,
            dataclasses.replace(arm.train, eval_every=every),
            self.placement,
            storage,
            self.failure,
            _ListenerReporter(arm, listener),
            self.program,
        )
        metrics: dict[str, Any] = trainer.fit().metrics or {}
        points = _read_points(MetricsReader(directory).read(), arm.train.steps)
        directory.delete("checkpoints")
        if arm.train.baseline:
            return points, 0, ordinary_ddp(worker, arm)
        return points, metrics["bytes_up"] + metrics["bytes_down"], metrics["bytes_ddp"]

    def _train_multihead(self, worker: Worker, arm: Arm) -> Iterator[tuple[int, Point | None]]:
        """Trains mhlora in one task, with the CPUs of all heads and the GPU of one."""
        config, options = placing.from_scaling_config(self.placement, 1)
        placement = placing.resolve(
            dataclasses.replace(config, heads_per_actor=1), 1, default_cpus=arm.lte.num_heads, **options
        )
        task = ray.remote(max_retries=0, num_returns="streaming")(_multihead_task)
        resources = {k: v for k, v in placement.bundle.items() if k not in ("CPU", "GPU")}
        stream = task.options(num_cpus=placement.bundle.get("CPU", 0), num_gpus=placement.gpus, resources=resources).remote(
            PickledObject.pickle(worker), arm.settings, arm.evaluate_every, max(1, int(placement.cpus)), placement.gpus > 0
        )
        try:
            for reference in stream:
                yield ray.get(reference)
        except ray.exceptions.RayError as error:
            raise to_lte_error(error, "mhlora") from error
        finally:
            ray.cancel(stream, force=True)


def _multihead_task(
    worker: PickledObject, settings: Settings, evaluate_every: int, threads: int, on_gpu: bool
) -> Iterator[tuple[int, Point | None]]:
    threads = settings.train.threads_per_head or threads
    yield from train_multihead(worker.load(), settings, evaluate_every, threads, "cuda" if on_gpu else "cpu")


def _inside(storage: str, directory: RunDirectory) -> str:
    """The URI of the runs' folder: parameters (``?endpoint_override=...``) stay at the end."""
    place, mark, query = storage.partition("?")
    return f"{place.rstrip('/')}/{split_run_path(directory.path)[1]}/{ARMS}{mark}{query}"


def _read_points(metrics: bytes, steps: int) -> list[Point]:
    """The evaluations in a run's metrics, but that of the untrained model."""
    samples, points, total = {0: 0}, [], 0
    rows = [json.loads(row) for row in metrics.splitlines()]
    for row in sorted((r for r in rows if r["kind"] == "merge"), key=lambda r: r["version"]):
        total += row["samples"]
        samples[row["version"]] = total
    last = max(samples)
    for row in rows:
        if row["kind"] == "evaluation" and row["version"]:
            figures = {name: float("nan") if value is None else value for name, value in row["values"].items()}
            step = steps if row["version"] == last else row["step"]
            points.append(Point(step, samples[row["version"]], figures))
    return sorted({point.samples: point for point in points}.values(), key=lambda point: point.samples)


class _ListenerReporter:
    """Tells a listener about the progress of a run."""

    def __init__(self, arm: Arm, listener: Listener) -> None:
        self._arm, self._listener, self._version = arm, listener, 0

    def update(self, progress: Progress) -> None:
        evaluation, point = progress.evaluation, None
        if evaluation is not None and evaluation.version > self._version:
            self._version = evaluation.version
            point = Point(evaluation.step, progress.samples, evaluation.values)
        self._listener(self._arm, progress.step, point)

    def close(self) -> None: ...
