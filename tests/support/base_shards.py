"""A coordinator with its shards in one process, and a local one to compare it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.aggregator import BaseShard, MeasuredContribution
from lte_ray.engine.coordinator.base_weights import BaseReader, BaseVersion
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.layout import Plan
from lte_ray.merging import Decision, Discard, Merge, MergePolicy, Pending, Roster, Wait
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import Contribution, OuterStep, StepCoefficients
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.plans import plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

HEADS = 3


def plans_with_ranks(ranks: Sequence[int]) -> list[Plan]:
    return [plan_from_shapes([(24, 20, r), (6, 40, r), (16, 16, r), (3, 3, 1)], [(5,), (3, 2)], scaling=0.5) for r in ranks]


def outer_step(version: int) -> OuterStep:
    """A step whose coefficients differ from version to version, and between factors and replicas."""
    coefficients = StepCoefficients(0.5, 1.0, 0.7 + 0.01 * version, 0.35)
    return OuterStep(coefficients, dataclasses.replace(coefficients, keep=1.0, add=0.9, change=0.0))


class Scripted:
    """Waits, discards the first, or merges all that is pending, perhaps with a step, as the test sets `next_decision`."""

    next_decision = "merge"

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if not pending or self.next_decision == "wait":
            return Wait("for the test", until=roster.now + 1e9)
        if self.next_decision == "discard":
            return Discard([pending[0].head], "the test says so")
        step = outer_step(roster.version) if self.next_decision == "step" else None
        return Merge({p.head: 0.3 + 0.1 * p.head - 0.05 * p.lag for p in pending}, step)


class Sharded:
    """A coordinator with its shards, wired as in the runtime, but in one process."""

    def __init__(self, merge: MergeConfig, plans: Sequence[Plan], policy: MergePolicy, base: Tensor, reset: str) -> None:
        settings = dataclasses.replace(make_settings(heads=len(plans), reset=reset), merge=merge)
        groups_of = make_groups(plans, merge)
        self.codecs = [Codec(plan, groups_of, merge) for plan in plans]
        entries = views(plans[0].base, base)
        parts = {i: gather(part.base, entries) for i, part in enumerate(self.codecs[0].group_plans)}
        self.shards = [
            BaseShard(
                self.codecs,
                {i: part for i, part in parts.items() if groups_of[i].shard == number},
                reset,
                send_down=merge.send_down,
            )
            for number in range(merge.shards)
        ]
        self.coordinator = Coordinator(settings, plans[0], None, policy, plans=plans)
        self.tickets = 0
        self.pending: dict[int, int] = {}

    def receive(self, contribution: Contribution, buffers: Sequence[Tensor]) -> EventResult:
        self.tickets += 1
        ticket, named = self.tickets, dict(enumerate(buffers))
        squares = sum(shard.receive(ticket, contribution.head, named) for shard in self.shards)
        event_result = self.coordinator.receive(contribution, MeasuredContribution(squares))
        refusal = event_result.refusal(contribution)
        if refusal is None:
            self.pending[contribution.head] = ticket
        else:  # it may quarantine its head, and others may be merged without it
            self.discard(ticket)
        tickets = {v.head: self.pending.pop(v.head) for v in event_result.results if v is not refusal}
        for merge in event_result.merges:
            for shard in self.shards:
                shard.merge(merge.version, {tickets[h]: weight for h, weight in merge.weights.items()}, merge.outer_step)
        for result in event_result.results:
            if not result.accepted and result is not refusal:
                self.discard(tickets[result.head])
        return event_result

    def restart_fresh(self, head: int, incarnation: int) -> None:
        """Another process of this head begins with B = 0; tells the coordinator and the shards."""
        assert self.coordinator.join(head, incarnation, fresh=True)
        for shard in self.shards:
            shard.forget_head(head)

    def discard(self, ticket: int) -> None:
        for shard in self.shards:
            shard.discard(ticket)

    def base(self) -> Tensor:
        """The whole base, from the shards' parts."""
        return self._assemble(lambda newest: newest.base.clone())

    def momentum(self) -> Tensor:
        """The whole momentum, from the shards' parts."""
        return self._assemble(momentum_of)

    def _assemble(self, read: BaseReader[Tensor]) -> Tensor:
        entries: dict[str, Tensor] = {}
        for shard in self.shards:
            for index in shard.groups:
                part = shard.schedule_read(index, read)
                shard.catch_up()
                entries.update(views(self.codecs[0].group_plans[index].base, part.result()))
        return gather(self.codecs[0].plan.base, entries)

    def reference(self, index: int, head: int) -> Tensor | None:
        """A head's reference in one group, as the newest version holds it."""
        (shard,) = [shard for shard in self.shards if index in shard.groups]
        groups_of = shard.schedule_read(index, lambda newest: newest.references.get(head))
        shard.catch_up()
        return groups_of.result()


def make_both(merge: MergeConfig, ranks: Sequence[int], reset: str, policy: Callable[[], Any]) -> tuple[Coordinator, Sharded]:
    """A local and a sharded coordinator with the same base."""
    plans = plans_with_ranks(ranks)
    base = random_flat(plans[0].base.size, 1).float()
    settings = dataclasses.replace(make_settings(heads=len(plans), reset=reset), merge=merge)
    local = Coordinator(settings, plans[0], base.clone(), policy(), plans=plans)
    return local, Sharded(merge, plans, policy(), base, reset)


def momentum_of(newest: BaseVersion) -> Tensor:
    """A version's momentum, as a copy; zeros if it has none."""
    return torch.zeros_like(newest.base) if newest.momentum is None else newest.momentum.clone()


def assert_same_momentum(local: Coordinator, sharded: Sharded) -> None:
    """The momentum of the shards is that of the local coordinator, bit for bit."""
    assert torch.equal(local.base_weights.read(momentum_of), sharded.momentum())


def assert_same(a: EventResult, b: EventResult) -> None:
    """Equal results and records, except for the clock."""
    assert a.results == b.results
    assert [dataclasses.replace(m, at=0) for m in a.merges] == [dataclasses.replace(m, at=0) for m in b.merges]
