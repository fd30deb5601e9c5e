"""Starts a simulation: for a worker that trains for real, or for shapes alone, which only keeps time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import rejoin
from lte_ray.engine.in_process import LoopbackTransport, evaluate_base
from lte_ray.engine.prepare import Initial, prepare
from lte_ray.engine.process_tuning import head_threads, torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.messages import CommittedPosition, Contribution, HeadDirective
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.head import TINY_PLAN, TimedHead
from lte_ray.simulation.record import VirtualRun
from lte_ray.simulation.simulator import Simulation
from lte_ray.worker import Worker


@dataclass(frozen=True)
class Trained:
    """A simulation that trained: its record, the final base (flat, in `plan.base`), and the engine that made it."""

    record: VirtualRun
    plan: Plan
    base: Tensor
    coordinator: Coordinator


def keep_time(plans: list[Plan], settings: Settings, cluster: ClusterModel) -> VirtualRun:
    """A run of which only times and bytes are known: the real coordinator and policy decide about heads without models.

    Args:
        plans: what each head would train; one for all is enough.

    Raises:
        ConfigError: the settings don't fit the plans.
        PolicyError: as a real run; and the policy wants an evaluation.
    """
    clock = Clock()
    heads = settings.lte.num_heads
    merge = replace(settings.merge, shards=1)  # of the one number that is merged
    coordinator = Coordinator(
        replace(settings, merge=merge), TINY_PLAN, torch.zeros(1), make_policy(settings.merge), clock=lambda: clock.now
    )
    sizes = CostModel(plans * heads if len(plans) == 1 else plans, settings.merge)
    return Simulation(settings, cluster, sizes, clock, coordinator, lambda n, k: TimedHead(settings.run, n, k)).run()


def train(worker: Worker, settings: Settings, cluster: ClusterModel, dtype: torch.dtype = torch.float32) -> Trained:
    """A run whose gradient steps are real and whose time is virtual.

    Where all heads are equal and wait for each other, it gives the weights of `engine.simulate` and of Ray, bit for bit.

    Raises:
        LTEError: as `engine.simulate.simulate`.
    """
    initial = prepare(worker, settings, dtype)
    clock = Clock()
    coordinator = Coordinator(
        settings,
        initial.plan,
        initial.base.clone(),
        make_policy(settings.merge),
        plans=initial.plans,
        clock=lambda: clock.now,
    )
    trainees = _Trainees(worker, settings, cluster, initial, coordinator, dtype)
    sizes = CostModel(initial.plans, settings.merge)
    _, threads = head_threads(settings.train.threads_per_head, 1)
    with torch_threads(threads):
        record = Simulation(settings, cluster, sizes, clock, coordinator, trainees.make, trainees.evaluate).run()
        base = coordinator.base
        return Trained(replace(record, evaluation=trainees.evaluate(base)), initial.plan, base, coordinator)


class _Trainees:
    """Makes the engine's heads, and judges bases."""

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        cluster: ClusterModel,
        initial: Initial,
        coordinator: Coordinator,
        dtype: torch.dtype,
    ) -> None:
        self._worker, self._settings, self._initial = worker, settings, initial
        self._dtype = dtype
        merge, heads = settings.merge, settings.lte.num_heads
        self._transit = LoopbackTransport(initial.plans, merge, coordinator, dtype)
        self._steps = [settings.train.steps] * heads
        self._shared = is_shared(settings)
        if self._shared:  # a head's learning rate follows the share of the steps that it will take by its speed
            rates = [1 / cluster.speed(n) for n in range(heads)]
            self._steps = [max(1, round(settings.train.steps * heads * rate / sum(rates))) for rate in rates]

    def make(self, number: int, incarnation: int) -> _SendingHead:
        """Head `number`; what it contributes has been through the transfer format."""
        settings = replace(self._settings, train=replace(self._settings.train, steps=self._steps[number]))
        head = _SendingHead(self._worker, settings, number, dtype=self._dtype, incarnation=incarnation)
        head.transit = self._transit
        if self._shared:  # the whole budget, not its expected share, says when it ends
            every = self._settings.train.steps * self._settings.lte.num_heads
            head.apply_directive(HeadDirective(self._settings.merge.merge_iter, every))
        return head

    def evaluate(self, base: Tensor) -> Mapping[str, float]:
        """The worker's judgement of a base."""
        return evaluate_base(self._worker, self._initial, base)


class _SendingHead(Head):
    """A head whose contributions come out as the coordinator gets them."""

    transit: LoopbackTransport

    def rejoin(self, standing: CommittedPosition, version: int, base: Tensor) -> None:
        rejoin(self, standing, None, version, base, None)

    def contribute(self) -> Contribution:
        return self.transit(self, super().contribute())
