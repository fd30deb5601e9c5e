"""The event loop of the coordinator's process, without Ray: the results of contributions, and checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.merging import Decision, Merge, Pending, Roster, Wait
from lte_ray.messages import CheckpointRequest, ContributionResult, MergeRecord
from lte_ray.runtime.context import RetentionPolicy
from lte_ray.runtime.coordinator import checkpointing
from lte_ray.runtime.coordinator.aggregators import Published
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.submissions import SubmissionLoop
from lte_ray.runtime.object_store import Handle
from lte_ray.storage import RunDirectory
from tests.support.checkpoint_damage import FACTS, PLAN, write_checkpoint
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

CONTEXT: Any = SimpleNamespace(transport=None, merge_threads=lambda part, whole: 1)


class MergeTogether:
    """Merges all heads together."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if len(pending) < roster.num_heads:
            return Wait("for the others", until=roster.now + 1e9)
        return Merge({p.head: 1 / len(pending) for p in pending})


class FakeAggregator:
    """An aggregator and broadcaster that record discarded tickets and refusals."""

    def __init__(self) -> None:
        self.discarded: list[int] = []
        self.refusals: list[ContributionResult] = []

    async def receive(self, ticket: int, head: int, handles: Sequence[Tensor], checksums: Sequence[int]) -> Tensor:
        return handles[0]

    def discard(self, ticket: int) -> None:
        self.discarded.append(ticket)

    def publish_merges(self, merges: Sequence[MergeRecord], buffers: Mapping[int, Any], tickets: Mapping[int, int]) -> None:
        """What follows a merge isn't tested here."""

    def record_refusal(self, result: ContributionResult) -> None:
        self.refusals.append(result)


def test_a_process_that_was_given_up_gets_its_answer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that was cut off and replaced contributes as before; it must not do so in a tight loop until it is ended."""
    monkeypatch.setattr("lte_ray.runtime.coordinator.submissions.STALE_SECONDS", 3600.0)

    async def run() -> None:
        plan = plan_from_shapes([(6, 5, 2)], [(4,)])
        engine = Coordinator(make_settings(heads=2), plan, random_flat(plan.base.size, 1).float(), MergeTogether())
        engine.lose(1)
        fake, tasks = FakeAggregator(), BackgroundTasks(lambda: None)
        submissions = SubmissionLoop(CONTEXT, engine, fake, fake, tasks)  # type: ignore[arg-type]
        stale = asyncio.ensure_future(submissions.submit(make_contribution(1, 1)))
        while not fake.refusals:
            await asyncio.sleep(0)
        assert "isn't one of the live heads" in fake.refusals[0].reason
        await asyncio.sleep(0.01)
        assert not stale.done()
        stale.cancel()

    asyncio.run(run())


def test_the_contribution_of_a_dropped_head_is_refused_and_discarded() -> None:
    """Its result arrives, nothing of it is kept, and the others are merged without it."""

    async def run() -> None:
        plan = plan_from_shapes([(6, 5, 2)], [(4,)])
        engine = Coordinator(make_settings(heads=3), plan, random_flat(plan.base.size, 1).float(), MergeTogether())
        fake, tasks = FakeAggregator(), BackgroundTasks(lambda: None)
        submissions = SubmissionLoop(CONTEXT, engine, fake, fake, tasks)  # type: ignore[arg-type]
        buffers = [random_flat(plan.contribution.size, seed).float() for seed in range(3)]
        pending = [
            asyncio.ensure_future(submissions.submit(make_contribution(head, 1, buffer=(buffers[head],)))) for head in (0, 1)
        ]
        await asyncio.sleep(0.01)
        assert submissions._undecided.keys() == {0, 1}
        submissions.handle(lambda: engine.drop(1))
        result = await pending[1]
        assert not result.accepted
        assert "head 1 has left the run" in result.reason
        assert fake.discarded == [2]
        assert submissions._undecided.keys() == {0}
        assert (await submissions.submit(make_contribution(2, 1, buffer=(buffers[2],)))).accepted
        assert (await pending[0]).accepted
        assert not submissions._undecided

    asyncio.run(run())


def test_a_head_that_cannot_write_its_part_costs_only_that_checkpoint(tmp_path: Path) -> None:
    """It isn't committed without the part, as it would be if the head's process were gone; the next one removes its files."""
    directory = RunDirectory.open(str(tmp_path), "r")
    write_checkpoint(directory, 2)
    base = random_flat(PLAN.base.size, 1).float()

    async def fetch_async(handle: Handle) -> Tensor:
        return base

    common = SimpleNamespace(
        directory=directory, retention=RetentionPolicy(1), transport=SimpleNamespace(fetch_async=fetch_async)
    )
    manager = checkpointing.CheckpointManager(common, PLAN, 2, (0, 1))  # type: ignore[arg-type]
    published = Published(4, {-1: None})  # type: ignore[dict-item]

    async def run() -> None:
        for version, why in ((4, "the state of head 1: No space left on device"), (6, "")):
            manager._open[version] = checkpointing._OpenCheckpoint(FACTS, CheckpointRequest(version, {0: 1, 1: 1}), {0, 1}, {})
            await manager.write_base(version, published)
            state, meta = {"reference": torch.zeros(3)}, {"step": 4}
            await manager.add_part(version, 0, checkpoint.write_head(directory, version, 0, state, meta))
            assert (4 in checkpoint.incomplete_versions(directory)) == (version == 4)
            await manager.add_part(version, 1, None, why)
            assert checkpoint.complete_versions(directory) == ([2] if why else [6])
            assert manager.problem == (f"checkpoint 4 couldn't be written: {why}" if why else "")
            assert manager.unfinished == []

    asyncio.run(run())
    assert checkpoint.read_manifest(directory, 6).heads == (0,)
