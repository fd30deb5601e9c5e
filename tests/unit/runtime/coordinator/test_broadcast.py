"""What the broadcaster sends to heads, to the driver and into checkpoints after a merge, without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.merging import Arrival, Average, ComposedPolicy, Nesterov
from lte_ray.messages import CHECKSUM_INTERVAL, CheckpointRequest, ContributionResult, OuterStep, StepCoefficients
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import LocalAggregator
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.broadcast import Broadcaster, is_due
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.coordinator.submissions import SubmissionLoop
from lte_ray.transfer.checksum import base_checksum, buffers_checksum
from lte_ray.transfer.groups import make_groups
from tests.support.base_shards import momentum_of
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLAN = plan_from_shapes([(24, 20, 2), (6, 40, 2)], [(5,)])
MERGE = MergeConfig(wait=False, when="arrival", send_down="factors", merge_threads=1)


class CountingTransport:
    """Handles are copies of the tensors; counts those that were published."""

    def __init__(self) -> None:
        self.published = 0

    def publish(self, buffer: Tensor) -> Tensor:
        self.published += 1
        return buffer.clone()

    async def fetch_async(self, handle: Tensor) -> Tensor:
        return handle


class RecordedCheckpoints(CheckpointManager):
    """Writes nothing; records the versions whose base it was asked to write."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, PLAN, None, ())
        self.written: list[int] = []
        self.momentum: list[Any] = []

    async def write_base(self, version: int, published: Any) -> None:
        assert -1 in published.parts
        self.written.append(version)
        self.momentum.append(published.momentum.get(-1))


class Process:
    """A coordinator's process with two heads, wired as `CoordinatorActor` does it."""

    def __init__(self, merge: MergeConfig = MERGE, rule: Any = None, **train: Any) -> None:
        settings = dataclasses.replace(make_settings(heads=2), merge=merge)
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, **train))
        self.transport = CountingTransport()
        context = RunContext(None, settings, None, self.transport, make_groups((PLAN, PLAN), merge))  # type: ignore[arg-type]
        policy = ComposedPolicy(rule or Average(), Arrival())
        self.engine = Coordinator(settings, PLAN, random_flat(PLAN.base.size, 1).float(), policy)
        self.codec = context.codecs([PLAN])[0]
        aggregator = LocalAggregator(context, self.engine)
        self.checkpoints, self.tasks = RecordedCheckpoints(context), BackgroundTasks(lambda: None)
        self.broadcaster = Broadcaster(context, self.engine, aggregator, self.checkpoints, self.tasks)
        self.broadcaster.reachable_heads = {0, 1}
        self.submissions = SubmissionLoop(context, self.engine, aggregator, self.broadcaster, self.tasks)

    async def contribute(self, head: int, sequence: int, scale: float = 0.01) -> ContributionResult:
        """Sends a contribution, and waits until what follows it is done."""
        flat = scale * random_flat(PLAN.contribution.size, 10 * sequence + head).float()
        buffers = tuple(self.codec.encode(flat, self.engine.reference(head))[0])
        checksums = tuple(buffers_checksum([buffer]) for buffer in buffers)
        contribution = make_contribution(head, sequence, version=self.engine.version, checksums=checksums, buffer=buffers)
        result = await self.submissions.submit(contribution)
        while self.tasks.busy:
            await asyncio.sleep(0)
        assert self.tasks.failure is None
        return result


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_a_process_receives_the_merges_since_its_version_or_the_whole_base() -> None:
    """Factors to one that has a version, base and references to one that has none; both with the positions of the heads."""

    async def test() -> None:
        process = Process()
        for sequence, head in enumerate((0, 1), 1):
            assert (await process.contribute(head, sequence)).accepted
        since, whole = await process.broadcaster.reply((0,), 1), await process.broadcaster.reply((0,), -1)
        assert [delta.version for delta in since.deltas] == [2]
        assert since.deltas[0].weights == {1: 0.5}
        factored = {i for i, group in enumerate(process.codec.groups) if group.by_factors}
        assert not factored & since.base_parts.keys()
        assert factored <= whole.base_parts.keys()
        assert whole.references.keys() == {0, 1}
        for reply in (since, whole):
            assert reply.version == 2
            assert {head: position.sequence for head, position in reply.positions.items()} == {0: 1, 1: 2}
            assert reply.directives.keys() == {0}

    run(test)


def test_a_process_that_adds_the_changes_has_the_coordinators_base() -> None:
    """In int8: one change for each version that it lacks, and the base for one that lacks more than the base is worth."""

    async def test() -> None:
        process = Process(dataclasses.replace(MERGE, send_down="int8"))
        base = process.engine.base.clone()
        for sequence in range(1, 4):
            assert (await process.contribute(sequence % 2, sequence)).accepted
        reply = await process.broadcaster.reply((0,), 0)
        assert [delta.version for delta in reply.deltas] == [1, 2, 3]
        assert not reply.base_parts
        for delta in reply.deltas:
            assert delta.changes[0].nbytes < 1.1 * PLAN.base.size
            base += process.codec.change_packings[0].decode(delta.changes[0])
        assert torch.equal(base, process.engine.base)
        for sequence in range(4, 8):
            assert (await process.contribute(sequence % 2, sequence)).accepted
        late = await process.broadcaster.reply((0,), 0)
        assert torch.equal(late.base_parts[0], process.engine.base)
        assert not late.deltas
        assert not late.references

    run(test)


def test_each_version_is_published_once() -> None:
    """Replies to other processes reuse the handles until the next merge."""

    async def test() -> None:
        process = Process()
        await process.contribute(0, 1)
        first = await asyncio.gather(*(process.broadcaster.reply((head,), -1) for head in (0, 1)))
        count = process.transport.published
        again = await process.broadcaster.reply((0,), -1)
        assert process.transport.published == count
        assert all(again.base_parts[i] is part for reply in first for i, part in reply.base_parts.items())
        await process.contribute(0, 2)
        assert (await process.broadcaster.reply((0,), -1)).version == 2
        assert process.transport.published > count

    run(test)


def test_momentum_goes_to_processes_that_begin_to_redo_merges_and_into_checkpoints() -> None:
    """One that redoes them already receives the step. Nobody receives momentum before a merge has added to it."""

    async def test() -> None:
        process = Process(rule=Nesterov(lr=0.7, momentum=0.5), eval_every=0, checkpoint_every=2)
        assert (await process.broadcaster.reply((0,), -1)).momentum == {}
        for sequence, head in enumerate((0, 1), 1):
            await process.contribute(head, sequence)
        momentum = process.engine.base_weights.read(momentum_of)
        since, whole = await process.broadcaster.reply((0,), 1), await process.broadcaster.reply((0,), -1)
        assert since.momentum == {}
        assert since.deltas[0].outer_step == OuterStep(*[StepCoefficients(0.5, 1.0, 0.7, 0.35)] * 2)
        assert torch.equal(whole.momentum[0], momentum)  # there is one group
        assert process.checkpoints.written == [2]
        assert torch.equal(process.checkpoints.momentum[0], momentum)
        for sequence in range(3, CHECKSUM_INTERVAL + 1):
            await process.contribute(0, sequence)
        base, momentum = process.engine.base, process.engine.base_weights.read(momentum_of)
        expected = (base_checksum(base) + base_checksum(momentum)) % 2**64
        assert (await process.broadcaster.reply((0,), 0)).checksum == (CHECKSUM_INTERVAL, expected)

    run(test)


def test_heads_receive_the_checksum_of_what_they_redo() -> None:
    """Of every tenth version, over the groups that travel as factors."""

    async def test() -> None:
        process = Process()
        for sequence in range(1, CHECKSUM_INTERVAL):
            await process.contribute(0, sequence)
        assert (await process.broadcaster.reply((0,), 0)).checksum is None
        await process.contribute(0, CHECKSUM_INTERVAL)
        names = [name for group in process.codec.groups if group.by_factors for name in group.names]
        entries = {entry.name: entry for entry in PLAN.base.entries}
        parts = [process.engine.base[e.offset : e.offset + e.size] for e in (entries[name] for name in names)]
        expected = sum(base_checksum(part) for part in parts) % 2**64
        assert (await process.broadcaster.reply((0,), 0)).checksum == (CHECKSUM_INTERVAL, expected)

    run(test)


def test_the_driver_sees_each_merge_until_it_has_seen_it() -> None:
    """With the base where an evaluation is due, and the bytes that the wire format takes."""

    async def test() -> None:
        process = Process(eval_every=2, checkpoint_every=0)
        for sequence in (1, 2):
            await process.contribute(0, sequence)
        first, second = process.broadcaster.merges_after(0)
        assert (first.version, second.version) == (1, 2)
        assert first.base is None
        assert torch.equal(second.base, process.engine.base)
        assert first.bytes_up == sum(process.codec.buffer_sizes)
        assert first.alternative_bytes["diloco"] == PLAN.base.size * 4
        assert [merge.version for merge in process.broadcaster.merges_after(1)] == [2]
        await process.contribute(0, 3)
        assert [merge.version for merge in process.broadcaster.merges_after(2)] == [3]

    run(test)


def test_a_checkpoint_asks_each_head_once_and_the_last_version_has_one() -> None:
    """Begun at a multiple of `checkpoint_every`; `checkpoint_last_version` adds one, and requests what is missing."""

    async def test() -> None:
        process = Process(eval_every=0, checkpoint_every=2)
        for sequence in (1, 2, 3):
            await process.contribute(0, sequence)
        assert process.checkpoints.written == [2]
        (request,) = (await process.broadcaster.reply((0,), 0)).checkpoint_requests
        assert (request.version, request.sequences) == (2, {0: 2})
        assert (await process.broadcaster.reply((0,), 0)).checkpoint_requests == ()
        requests = await process.broadcaster.checkpoint_last_version(early=False)
        assert [(each.version, each.sequences) for each in requests] == [(2, {0: 2, 1: 0}), (3, {0: 3, 1: 0})]
        assert isinstance(requests[1], CheckpointRequest)
        assert process.checkpoints.requests_in_reply((0, 1)) == ()

    run(test)


@pytest.mark.parametrize(
    ("every", "before", "after", "due"), [(0, 0, 9, False), (3, 0, 2, False), (3, 2, 3, True), (3, 2, 7, True)]
)
def test_what_is_due_every_few_versions_is_not_missed_by_several_merges_at_once(
    every: int, before: int, after: int, due: bool
) -> None:
    """A multiple of `every` in (before, after]; never if it is 0."""
    assert is_due(every, before, after) == due
