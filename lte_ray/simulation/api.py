"""Runs a simulation: of shapes alone, which only keeps time, or of a worker that really trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import rejoin
from lte_ray.engine.in_process import LoopbackTransport, evaluate_base, evaluate_newest
from lte_ray.engine.prepare import Initial, prepare
from lte_ray.engine.process_tuning import head_threads, torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.messages import CommittedPosition, Contribution, HeadDirective
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.cost_model import CostModel, as_sent
from lte_ray.simulation.head import TINY_PLAN, TimedHead
from lte_ray.simulation.record import SimulationRecord
from lte_ray.simulation.simulator import Simulation
from lte_ray.worker import Worker


@dataclass(frozen=True)
class SimulatedTraining:
    """A simulation that trained: its record, the final base (flat, in `plan.base`), and the coordinator that merged it."""

    record: SimulationRecord
    plan: Plan
    base: Tensor
    coordinator: Coordinator


def simulate_time(plans: list[Plan], settings: Settings, cluster: ClusterModel) -> SimulationRecord:
    """Simulates times and bytes only: the real coordinator and policy decide about heads that have no models.

    Args:
        plans: what each head would train; one for all is enough.

    Raises:
        ConfigError: the settings don't fit the plans.
        PolicyError: as in a real run; or the policy needs an evaluation.
    """
    clock, settings = Clock(), settings.resolved()
    num_heads = settings.lte.num_heads
    merge = replace(settings.merge, shards=1)  # of the one number that is merged
    coordinator = Coordinator(
        replace(settings, merge=merge), TINY_PLAN, torch.zeros(1), make_policy(settings.merge), clock=lambda: clock.now
    )
    costs = CostModel(plans * num_heads if len(plans) == 1 else plans, as_sent(settings.merge))
    return Simulation(settings, cluster, costs, clock, coordinator, lambda n, k: TimedHead(settings.run, n, k)).run()


def simulate_training(
    worker: Worker, settings: Settings, cluster: ClusterModel, dtype: torch.dtype = torch.float32
) -> SimulatedTraining:
    """Simulates a run whose gradient steps are real and whose time is virtual.

    If all heads are equal and wait for each other, the weights are those of `engine.in_process` and of Ray, bit for bit.

    Raises:
        LTEError: as `engine.in_process.run_in_process`.
    """
    settings = settings.resolved()
    initial = prepare(worker, settings, dtype)
    settings = initial.complete(replace(settings, merge=choose_policy(settings, initial)))
    clock = Clock()
    coordinator = Coordinator(
        settings,
        initial.plan,
        initial.base.clone(),
        make_policy(settings.merge),
        plans=initial.plans,
        clock=lambda: clock.now,
    )
    factory = _HeadFactory(worker, settings, cluster, initial, coordinator, dtype)
    costs = CostModel(initial.plans, as_sent(settings.merge))
    _, threads = head_threads(settings.train.threads_per_head, 1)
    with torch_threads(threads):
        record = Simulation(settings, cluster, costs, clock, coordinator, factory.make_head, factory.evaluate).run()
        record = replace(record, evaluation=evaluate_newest(worker, initial, coordinator))
        return SimulatedTraining(record, initial.plan, coordinator.base, coordinator)


class _HeadFactory:
    """Makes the engine's heads, and evaluates bases."""

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
        num_heads = settings.lte.num_heads
        self._transport = LoopbackTransport(initial.plans, settings.merge, coordinator, dtype)
        self._steps = [settings.train.steps] * num_heads
        self._shares_steps = is_shared(settings)
        if self._shares_steps:  # a head's learning rate follows the share of the steps that its speed will let it take
            rates = [1 / cluster.speed(n) for n in range(num_heads)]
            self._steps = [max(1, round(settings.train.steps * num_heads * rate / sum(rates))) for rate in rates]

    def make_head(self, number: int, incarnation: int) -> _LoopbackHead:
        """Makes head `number`, whose contributions pass through the transfer format."""
        settings = replace(self._settings, train=replace(self._settings.train, steps=self._steps[number]))
        head = _LoopbackHead(self._worker, settings, number, dtype=self._dtype, incarnation=incarnation)
        head.transport = self._transport
        if self._shares_steps:  # the budget of all heads, not the head's expected share, decides when it ends
            total = self._settings.train.steps * self._settings.lte.num_heads
            head.apply_directive(HeadDirective(self._settings.merge.steps_between(0), total))
        return head

    def evaluate(self, base: Tensor) -> Mapping[str, float]:
        """The worker's evaluation of a base."""
        return evaluate_base(self._worker, self._initial, base)


class _LoopbackHead(Head):
    """A head whose contributions are as the coordinator receives them."""

    transport: LoopbackTransport

    def rejoin(self, position: CommittedPosition, version: int, base: Tensor) -> None:
        rejoin(self, position, None, version, base, None)

    def contribute(self) -> Contribution:
        return self.transport(self, super().contribute())
