"""The same heads and coordinator without Ray: all in one process, in turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.engine.coordinator import Coordinator, Outcome
from lte_ray.engine.head import Head
from lte_ray.engine.initial import prepare
from lte_ray.engine.settings import Settings
from lte_ray.engine.threads import head_threads, merge_threads, torch_threads
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.messages import MergeRecord
from lte_ray.worker import Worker


@dataclass(frozen=True)
class Simulated:
    """A finished simulation: the merged base (flat, in `plan.base`), and every merge."""

    plan: Plan
    base: Tensor
    merges: tuple[MergeRecord, ...]
    heads: tuple[Head, ...]
    coordinator: Coordinator


def simulate(worker: Worker, settings: Settings, dtype: torch.dtype = torch.float32) -> Simulated:
    """Runs all heads to the end, each a round at a time in the order of their numbers.

    With a policy that waits for all heads the result is that of the same run on Ray, bit for bit on one machine.

    Raises:
        WorkerFailed, PolicyError: as on Ray.
    """
    initial = prepare(worker, settings, dtype)
    coordinator = Coordinator(
        settings, initial.plan, initial.base.clone(), make_policy(settings.merge.policy), plans=initial.plans
    )
    threads = head_threads(settings.train.threads_per_head, 1)
    merging = merge_threads(settings.merge.merge_threads, initial.plan, settings.lte.num_heads)
    heads = [Head(worker, settings, n, dtype=dtype) for n in range(settings.lte.num_heads)]
    merges: list[MergeRecord] = []
    waiting: set[int] = set()
    for head in heads:
        head.start(0, coordinator.base)

    def settle(outcome: Outcome) -> None:
        merges.extend(outcome.merges)
        for verdict in outcome.verdicts:
            waiting.discard(verdict.head)
            base = coordinator.base if coordinator.version != heads[verdict.head].version else None
            heads[verdict.head].adopt(verdict, coordinator.version, base)

    while ready := [h for h in heads if h.head in coordinator.live and h.head not in waiting]:
        for head in ready:
            if head.done:
                with torch_threads(merging):
                    settle(coordinator.leave(head.head))
                continue
            with torch_threads(threads):
                contribution = head.train_round()
            waiting.add(head.head)
            with torch_threads(merging):
                settle(coordinator.receive(contribution, contribution.buffer))
    return Simulated(initial.plan, coordinator.base, tuple(merges), tuple(heads), coordinator)
