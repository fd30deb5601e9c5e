"""The actor that has Ray Train start the processes of ordinary training, and passes on what they report.

It is an actor of its own so that the driver can end the processes at any time: Ray ends what an actor has started with it. It
owns the weights that are evaluated, so that they outlive the processes.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from lte_ray.errors import HeadLost, LTEError
from lte_ray.messages import MergeRecord
from lte_ray.runtime.data_parallel.messages import ProcessesStatus, ProcessReport, ProcessSetup
from lte_ray.runtime.data_parallel.process import run_process
from lte_ray.runtime.placement import Placement

FOLDER = "ray-train"
"""Ray Train's own folder in the run's directory, which is removed at the end."""

COLLECTIVE_TIMEOUT = 1800
"""Seconds after which a process that waits for another one's gradients gives up."""


class DataParallelActor:
    """Starts the processes and answers the driver meanwhile.

    Args:
        setup: what the processes get.
        placement: what each reserves.
        max_failures: how often they may be started again; -1: any number of times.
        head_failures: how often in a row without a newer version; -1: any number of times.
    """

    def __init__(self, setup: ProcessSetup, placement: Placement, max_failures: int, head_failures: int) -> None:
        self._setup, self._placement = setup, placement
        self._max_failures, self._head_failures = max_failures, head_failures
        self._error: LTEError | None = None
        self._stopping = False
        self._lock = threading.Lock()  # guards all that follows: calls come in several threads
        self._starts = self._failures_in_a_row = 0
        self._start_version = self._furthest = self._furthest_at_start = setup.start.version
        self._merges: tuple[MergeRecord, ...] = ()
        self._final: tuple[int, Any, Any] | None = None
        self._report: ProcessReport | None = None

    def fit(self) -> None:
        """Trains to the end of the run.

        Raises:
            LTEError: the worker's code raised, or processes died too often.
        """
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # the worker's relative paths are those of the driver's folder
        directory, gpus = self._setup.context.directory, self._placement.gpus
        setup, actor = self._setup, ray.get_runtime_context().current_actor

        def train() -> None:
            run_process(setup, actor)

        trainer = TorchTrainer(
            train,
            torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=COLLECTIVE_TIMEOUT),
            scaling_config=ray.train.ScalingConfig(
                num_workers=setup.context.settings.train.baseline_processes,
                use_gpu=gpus > 0,
                resources_per_worker=self._placement.bundle,
                placement_strategy=self._placement.strategy,
                label_selector=dict(self._placement.labels) or None,
            ),
            run_config=ray.train.RunConfig(
                name=FOLDER,
                storage_path=directory.path,
                storage_filesystem=directory.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=self._max_failures),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            reason = str(error).strip().splitlines()[-1]
            more = f" (--max-failures is {self._max_failures})" if self._max_failures else ""
            raise self._error or HeadLost(f"A process of ordinary training died{more}: {reason}") from error
        if self._error is not None:
            raise self._error

    # -- called by the first process -------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def begin(self, version: int) -> bool:
        """The processes start from this version; returns whether they may. What was reported of later versions is void."""
        if self._error is not None or self._stopping:
            return False
        with self._lock:
            if self._starts:
                self._failures_in_a_row = self._failures_in_a_row + 1 if self._furthest == self._furthest_at_start else 1
            if 0 <= self._head_failures < self._failures_in_a_row:
                times = self._failures_in_a_row
                self._error = HeadLost(f"Processes of ordinary training died {times} times without a newer version in between.")
                return False
            self._furthest_at_start = self._furthest
            self._merges = tuple(merge for merge in self._merges if merge.version <= version)
            self._start_version, self._starts = version, self._starts + 1
        return True

    @ray.method(concurrency_group="ctl")
    def report(self, report: ProcessReport) -> bool:
        """Takes a report; returns whether the run is to stop."""
        publish = self._setup.context.transport.publish
        bases, emas = (
            {version: publish(torch.tensor(flat)) for version, flat in flats.items()} for flats in (report.bases, report.emas)
        )
        final = None
        if report.final is not None:
            version, *flats = report.final
            base, ema = (None if flat is None else publish(torch.tensor(flat)) for flat in flats)
            final = (version, base, ema)
        with self._lock:
            self._merges += tuple(replace(m, base=bases.get(m.version), ema=emas.get(m.version)) for m in report.merges)
            self._furthest = max([self._furthest, *(merge.version for merge in report.merges)])
            self._final = final or self._final
            self._report = replace(report, merges=(), bases={}, emas={}, final=None)
        return self._stopping

    @ray.method(concurrency_group="ctl")
    def fail(self, error: LTEError) -> None:
        """The run can't continue: the processes aren't started again."""
        self._error = self._error or error

    # -- called by the driver --------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def status(self, seen: int, starts: int) -> ProcessesStatus:
        """What has happened.

        Args:
            seen: the version that the driver has seen; merges up to it are forgotten.
            starts: that the driver knows of. If there was another since, merges that it has seen may be void, so all are kept.
        """
        with self._lock:
            if starts == self._starts:
                self._merges = tuple(merge for merge in self._merges if merge.version > seen)
            report = self._report
            return ProcessesStatus(
                starts=self._starts,
                start_version=self._start_version,
                status=report.status if report is not None else None,
                merges=self._merges,
                checkpoint=report.checkpoint if report is not None else None,
                problem=report.problem if report is not None else "",
                final=self._final,
            )

    @ray.method(concurrency_group="ctl")
    def stop(self) -> None:
        """Has the processes save and end after their round."""
        self._stopping = True
