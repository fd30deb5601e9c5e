"""Runs one arm in this process, on its CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.broadcast_log import alternative_bytes
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import available_cores, torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.ladder.arms import Arm
from lte_ray.ladder.figures import read_figures
from lte_ray.ladder.multihead import MultiheadTraining
from lte_ray.ladder.results import ArmResult, Point
from lte_ray.layout import Plan
from lte_ray.messages import MergeRecord
from lte_ray.simulation.cost_model import CostModel, as_sent
from lte_ray.worker import Worker

Listener = Callable[[Arm, int, Point | None], None]
"""Called while an arm trains, with the steps taken so far and the evaluation made there, if there is one."""


def ignore(arm: Arm, step: int, point: Point | None) -> None:
    """A listener that does nothing."""


@dataclass(frozen=True)
class ProcessRunner:
    """Runs arms in this process. Heads train at once as far as there are cores; they wait for merges whatever `wait` says.

    Args:
        worker: of the comparison.
        dtype: of merging.
    """

    worker: Worker
    dtype: torch.dtype = torch.float32

    def __call__(self, arm: Arm, listener: Listener = ignore) -> ArmResult:
        """Trains the arm to its end.

        Raises:
            WorkerFailed, PolicyError: as `run_in_process`.
        """
        started, worker = time.monotonic(), arm.make_worker(self.worker)
        if arm.mode == "mhlora":
            threads = arm.train.threads_per_head or min(arm.lte.num_heads, available_cores())
            points = []
            for step, point in train_multihead(worker, arm.settings, arm.evaluate_every, threads):
                listener(arm, step, point)
                points += [point] if point else []
            sent = ddp = 0
        else:
            points, sent, ddp = _train_heads(worker, arm, self.dtype, listener)
        return ArmResult(arm.key, arm.rung, arm.rate, arm.seed, tuple(points), time.monotonic() - started, sent, ddp)


def train_multihead(
    worker: Worker, settings: Settings, evaluate_every: int, threads: int, device: str = "cpu"
) -> Iterator[tuple[int, Point | None]]:
    """Trains multi-head LoRA; yields each step's number, with the evaluation every `evaluate_every` steps and at the end.

    Raises:
        LTEError: as `MultiheadTraining`.
    """
    steps = settings.train.steps
    with torch_threads(threads):
        training = MultiheadTraining(worker, settings, device)
        for step in range(1, steps + 1):
            training.train_step()
            due = step == steps or (evaluate_every and step % evaluate_every == 0)
            yield step, Point(step, training.samples, training.evaluate()) if due else None


def _train_heads(worker: Worker, arm: Arm, dtype: torch.dtype, listener: Listener) -> tuple[list[Point], int, int]:
    """Trains heads, or in the ordinary way; returns the evaluations and the bytes (`ArmResult.sent`, `ArmResult.ddp`)."""
    settings, cores = arm.settings.resolved(), available_cores()
    heads, wanted = settings.lte.num_heads, arm.lte.num_heads
    if heads == 1 and not settings.train.threads_per_head:  # as many cores as the heads of other arms
        settings = replace(settings, train=replace(settings.train, threads_per_head=min(wanted, cores)))
    watch = _MergeWatch(arm, heads, listener)
    run = run_in_process(
        worker,
        settings,
        dtype,
        heads_per_actor=heads,
        concurrent_heads=min(heads, cores),
        on_merge=watch,
    )
    points = watch.finish()
    sent = bytes_sent(run.coordinator.plans, run.coordinator.settings.merge, run.merges)
    return points, sent, _ddp_bytes(run.plan, arm)


@dataclass
class _MergeWatch:
    """Evaluates the base at the first merge after each evaluation is due, and at the end."""

    arm: Arm
    heads: int
    listener: Listener
    points: list[Point] = field(default_factory=list)
    samples: int = 0
    _evaluate: Callable[[], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self._due = self.arm.evaluate_every or self.arm.train.steps

    def __call__(self, record: MergeRecord, evaluate: Callable[[], Mapping[str, float]]) -> None:
        self.samples += record.samples
        self._evaluate, step, point = evaluate, record.steps_taken // self.heads, None
        if self._due <= step < self.arm.train.steps:
            point = self._evaluated(step)
            self._due = (step // self.arm.evaluate_every + 1) * self.arm.evaluate_every
        self.listener(self.arm, step, point)

    def _evaluated(self, step: int) -> Point:
        assert self._evaluate is not None
        with torch_threads(self.arm.train.threads_per_head or available_cores()):
            point = Point(step, self.samples, read_figures(self._evaluate))
        self.points.append(point)
        return point

    def finish(self) -> list[Point]:
        """Evaluates the last base; returns all evaluations, none if nothing was merged."""
        if self._evaluate is not None:
            steps = self.arm.train.steps
            self.listener(self.arm, steps, self._evaluated(steps))
        return self.points


def ordinary_ddp(worker: Worker, arm: Arm) -> int:
    """Bytes that data-parallel training of the arm's model sends, in as many processes as there are heads."""
    return _ddp_bytes(prepare(worker, arm.settings.resolved()).plan, arm)


def _ddp_bytes(plan: Plan, arm: Arm) -> int:
    return alternative_bytes(plan.base.size, arm.lte.num_heads, 0, arm.train.steps * arm.lte.num_heads)["ddp"]


def bytes_sent(plans: Sequence[Plan], merge: MergeConfig, merges: Sequence[MergeRecord]) -> int:
    """Bytes of all contributions, and of what brings the merged heads up to date, on machines of their own.

    Args:
        plans: each head's.
        merge: the formats.
        merges: all of a run.
    """
    if len(plans) == 1:
        return 0
    costs = CostModel(plans, as_sent(merge))
    total, versions = 0, dict.fromkeys(range(len(plans)), 0)
    for record in merges:
        for head in record.heads:
            down = costs.update_bytes(len(record.heads) - 1, record.version - versions[head])
            total += costs.contribution_bytes(head) + sum(down)
            versions[head] = record.version
    return total
