"""A run without Ray: the same heads and coordinator in one process, in turns.

Contributions take the same transfer formats as between processes (`LoopbackTransport`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.coordinator.ema import with_ema
from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.engine.independent import evaluate_heads
from lte_ray.engine.prepare import Initial, load_base, prepare
from lte_ray.engine.process_tuning import head_threads, merge_threads, torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.messages import Contribution, MergeRecord
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from lte_ray.worker import Worker, evaluate


class LoopbackTransport:
    """Encodes what heads send and decodes it as the coordinator does; leaves it as it is if the format loses nothing.

    Args:
        plans: each head's.
        merge: names the format.
        coordinator: holds the references to decode with.
        dtype: of the decoded contributions.
    """

    def __init__(self, plans: Sequence[Plan], merge: MergeConfig, coordinator: Coordinator, dtype: torch.dtype) -> None:
        self._coordinator = coordinator
        self._codecs: list[Codec] = []
        if merge.transfer != "fp32" or merge.replica_topk < 1:
            groups = make_groups(plans, merge)
            codecs = {plan: Codec(plan, groups, merge, dtype) for plan in set(plans)}
            self._codecs = [codecs[plan] for plan in plans]

    def __call__(self, head: Head, contribution: Contribution) -> Contribution:
        """Returns the contribution as the coordinator receives it; for the head it counts as what it contributed."""
        if not self._codecs:
            return replace(contribution, buffer=contribution.buffer.cpu())
        codec = self._codecs[head.number]
        sent = head.encode(contribution, codec)
        received = {group: buffer.cpu() for group, buffer in enumerate(sent.buffer)}
        return replace(sent, buffer=codec.decode(received, self._coordinator.reference(head.number)))


@dataclass(frozen=True)
class InProcessRun:
    """A finished run: the merged base (flat, in `plan.base`), and every merge."""

    plan: Plan
    base: Tensor
    merges: tuple[MergeRecord, ...]
    heads: tuple[Head, ...]
    coordinator: Coordinator


def run_in_process(
    worker: Worker,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
    *,
    heads_per_actor: int = 1,
    stack_heads: str = "never",
    concurrent_heads: int = 1,
    on_merge: Callable[[MergeRecord, Callable[[], Mapping[str, float]]], None] | None = None,
) -> InProcessRun:
    """Runs all heads to the end: groups of `heads_per_actor` heads in the order of their numbers, a round each at a time.

    If the policy waits for all heads, the result equals that of the same run on Ray, bit for bit on one machine. Heads wait
    for their merges whatever `wait` says, and time passes only when the policy waits for it; `lte_ray.simulation` simulates
    time too.

    Args:
        on_merge: called with each merge and a function that evaluates the newest base.

    Raises:
        WorkerFailed, PolicyError: as on Ray.
        Unstackable: as `HeadGroup`.
    """
    settings = settings.resolved()
    initial = prepare(worker, settings, dtype)
    settings = initial.complete(replace(settings, merge=choose_policy(settings, initial)))
    now = 0.0
    coordinator = Coordinator(
        settings, initial.plan, initial.base.clone(), make_policy(settings.merge), plans=initial.plans, clock=lambda: now
    )
    transport = LoopbackTransport(initial.plans, settings.merge, coordinator, dtype)
    _, threads = head_threads(settings.train.threads_per_head, 1)
    threads_to_merge = merge_threads(settings.merge.merge_threads, initial.plan, settings.lte.num_heads)
    numbers = range(settings.lte.num_heads)
    groups = [
        HeadGroup(
            worker,
            settings,
            numbers[n : n + heads_per_actor],
            dtype=dtype,
            stack_heads=stack_heads,
            concurrent_heads=concurrent_heads,
            threads=threads,
        )
        for n in numbers[::heads_per_actor]
    ]
    heads = [head for group in groups for head in group.heads]
    merges: list[MergeRecord] = []
    waiting: set[int] = set()
    for head in heads:
        head.start(0, initial.base)

    def apply(event_result: EventResult) -> None:
        merges.extend(event_result.merges)
        published = coordinator.base.clone() if event_result.results else None  # the coordinator continues to write to its own
        for result in event_result.results:
            head = heads[result.head]
            waiting.discard(result.head)
            head.adopt(result, coordinator.version, published if coordinator.version != head.version else None)
            # The partitions of heads that have left are assigned to the others.
            head.batch_stream.apply_assignments(*coordinator.assignor.pending_changes(head.number, coordinator.live))
        if on_merge is not None:
            for record in event_result.merges:
                on_merge(record, lambda: evaluate_newest(worker, initial, coordinator))
        if coordinator.candidate is not None:
            apply(coordinator.receive_evaluation(evaluate_base(worker, initial, coordinator.candidate)))

    def can_train(group: HeadGroup) -> bool:
        return any(head.number in coordinator.live and head.number not in waiting for head in group.heads)

    while (training := [group for group in groups if can_train(group)]) or coordinator.wakes_at is not None:
        if not training:
            assert coordinator.wakes_at is not None
            now = max(now, coordinator.wakes_at)
            apply(coordinator.tick())
        for group in training:
            for head in group.heads:
                if head.done and head.number in coordinator.live and head.number not in waiting:
                    with torch_threads(threads_to_merge):
                        apply(coordinator.leave(head.number))
            with torch_threads(threads):
                contributions = group.train_round(waiting | set(numbers) - coordinator.live)
            waiting.update(c.head for c in contributions)
            for contribution in contributions:
                with torch_threads(threads_to_merge):
                    sent = transport(heads[contribution.head], contribution)
                    apply(coordinator.receive(sent, sent.buffer))
    return InProcessRun(initial.plan, coordinator.base, tuple(merges), tuple(heads), coordinator)


def evaluate_newest(worker: Worker, initial: Initial, coordinator: Coordinator) -> Mapping[str, float]:
    """The worker's evaluation of the newest base, and of the moving average if there is one; or of each independent adapter."""
    if coordinator.settings.merge.never_merge:
        references = {head: coordinator.reference(head) for head in range(len(initial.plans))}
        adapters = {head: factors for head, factors in references.items() if factors is not None}
        return evaluate_heads(
            initial.plans, coordinator.base, adapters, lambda weights: evaluate_base(worker, initial, weights)
        )
    values, ema = evaluate_base(worker, initial, coordinator.base), coordinator.ema
    if ema is None:
        return values
    with preserve_generators(torch.device("cpu")):
        return with_ema(values, evaluate_base(worker, initial, ema))


def evaluate_base(worker: Worker, initial: Initial, base: Tensor) -> Mapping[str, float]:
    """The worker's evaluation of a base, in the unconverted model in eval mode."""
    load_base(initial.model, initial.plan, base)
    values = evaluate(worker, initial.model)
    initial.model.train()
    return values
