"""The coordinator's process: a thin shell around `engine.Coordinator`, as an asyncio actor.

No head's call blocks another's: each waits for its own future. The loop decides by numbers; products are computed in a thread
beside it, or in shards. `status` runs on a loop of its own. `ray.remote` is applied in `hub`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from lte_ray import checkpoint, fault_injection, storage
from lte_ray.data.assignment import PartitionAssignor
from lte_ray.engine.coordinator.broadcast_log import BroadcastLog
from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
from lte_ray.errors import HeadLost, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.merging.policies.trigger import load_policy_state
from lte_ray.messages import (
    CheckpointRequest,
    CommittedPosition,
    Contribution,
    ContributionResult,
    CoordinatorReply,
    JoinReply,
    MergeRecord,
)
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.coordinator.aggregators import Aggregator, LocalAggregator, ShardedAggregator
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.broadcast import Records, Updates
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.coordinator.submissions import SubmissionLoop
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.object_store import Handle, at_construction

PATIENCE = 600.0
"""Seconds to wait at the end of a run for checkpoints that are being written."""

LOOK = 0.01
"""Seconds between two looks at what a head that joins waits for."""


@dataclass(frozen=True)
class CoordinatorStatus:
    """The merges since the driver last asked, the newest checkpoint, and whether the policy needs the evaluator.

    `members` are the heads of the run; `without_data` those of them that have joined and wait for data; `trouble` says what is
    wrong with storage; `saves` is what heads are to write that may not have heard of it; `spike` says that the loss has spiked,
    and the last version before it did; `refusals` are the newest contributions that couldn't be merged, numbered.
    """

    version: int
    waiting_for: str
    merges: tuple[MergeRecord, ...]
    checkpoint: int | None
    needs_evaluator: bool = False
    members: tuple[int, ...] = ()
    without_data: tuple[int, ...] = ()
    storage_problem: str = ""
    checkpoint_requests: tuple[CheckpointRequest, ...] = ()
    spike: tuple[str, int] | None = None
    refusals: tuple[tuple[int, ContributionResult], ...] = ()


class CoordinatorActor:
    """Merges, answers heads, and completes checkpoints.

    Args:
        common: as every actor.
        plans: each head's, of the model that the driver built.
        policy: the merge policy.
        start: from where.
        shards: the `ShardActor`s by their number, where merging is spread over several.
    """

    def __init__(
        self,
        common: RunContext,
        plans: tuple[Plan, ...],
        policy: PickledObject,
        start: CoordinatorState,
        shards: Sequence[Any] = (),
    ) -> None:
        fault_injection.arm(common.fault_script)
        inject("coordinator begins", epoch=start.epoch)
        self._common, self._start, settings = common, start, common.settings
        threads = common.merge_threads(plans[0], plans[0])
        fetch = common.transport.fetch
        with at_construction():  # copies: what came in is shared and read-only
            base = None if shards else fetch(start.base).clone()
            references = {head: fetch(factors).clone() for head, factors in start.references.items()}
        self._engine = Coordinator(
            settings,
            plans[0],
            base,
            policy.load(),
            plans=plans,
            version=start.version,
            references={} if shards else references,
            taken=start.steps_taken,
            granted=start.step_limits,
            positions=start.positions,
            fresh=set(range(len(plans))) - start.references.keys(),
            members=start.members,
            assignor=PartitionAssignor.from_state(start.assignments) if start.assignments else None,
        )
        if start.outlier_filter:
            self._engine.outlier_filter.load_state(start.outlier_filter)
        if start.checkpoint_version is not None:
            manifest = checkpoint.read_manifest(common.directory, start.checkpoint_version)
            kept = checkpoint.read_policy(common.directory, manifest, settings.merge.policy)
            if kept:
                load_policy_state(self._engine.policy, kept)
        self._joined: set[int] = set()
        # By head, the incarnation that joins, and its call: that of a process that is gone mustn't go on.
        self._joining: dict[int, tuple[int, object]] = {}
        # All start together where whoever comes first would take the others' steps, or leave the version of their states.
        self._together = start.epoch == 0 and (self._engine.step_budget.shared or bool(start.exact_heads))
        # Exact states go with the version that they were saved at: nobody trains until all of these have its base.
        self._exact = set(start.exact_heads) if start.epoch == 0 else set()
        codecs = common.codecs(plans)
        self._masters: Aggregator = (
            ShardedAggregator(shards, codecs, start.version)
            if shards
            else LocalAggregator(common, self._engine, codecs, threads)
        )
        self._cuts = CheckpointManager(common, plans[0], start.checkpoint_version, start.saved_heads)
        self._waiters = BackgroundTasks(self._cuts.abandon_all)
        parts = [part.base.size * torch.float32.itemsize for part in codecs[0].group_plans]
        sizes = [codec.buffer_sizes for codec in codecs]
        downlink = BroadcastLog(common.groups, parts, sizes, start.version)
        self._records = Records(
            common, self._engine, self._masters, downlink, self._cuts, [sum(each) for each in sizes], self._waiters
        )
        self._records.present |= start.step_limits.keys()  # heads that an earlier coordinator had
        self._updates = Updates(self._engine, self._masters, downlink, self._records, self._cuts, len(common.groups))
        self._merging = SubmissionLoop(self._engine, self._masters, self._records, self._waiters, common.transport, threads)

    # -- heads -----------------------------------------------------------------------------------------------------

    async def join(self, plans: Mapping[int, Plan], incarnation: int) -> CoordinatorReply:
        """Heads ask where to start; `plans` are those of the models that they built.

        Raises:
            WorkerFailed: one isn't the model that the driver built.
        """
        engine, start = self._engine, self._start
        for head, plan in plans.items():
            ours = engine.plans[head]
            if plan != ours:
                differing = sorted(str(e) for e in {*plan.base.entries} ^ {*ours.base.entries})[:4]
                reason = f"build_model() gives another model here than in the driver; they differ in {differing}."
                raise WorkerFailed(f"head {head}", None, reason)
        call = (incarnation, object())
        self._joining |= dict.fromkeys(plans, call)

        def given_up() -> bool:
            return any(self._joining.get(head) is not call for head in plans)

        async def until(true: Callable[[], bool]) -> None:
            await self._until(lambda: true() or given_up())
            if given_up():
                raise HeadLost(f"The process of head {min(plans)} was given up while it joined")

        await until(lambda: not set(plans) & set(engine.pending_heads))  # of a predecessor's: it is still merged
        fresh = incarnation > 0 and self._common.rejoin == "fresh"
        afresh = {head for head in plans if engine.join(head, incarnation, fresh)}
        for head in afresh:
            self._masters.forget_head(head)
        self._joined |= plans.keys()
        await until(lambda: not self._together or self._joined >= engine.live)
        self._together = False
        await until(lambda: all(engine.has_data(head) for head in plans))
        # What a checkpoint holds of a head goes with that version's base: who asks again, for the answer was lost, after others
        # have gone on begins from what the base holds of it.
        first = incarnation == 0 and start.epoch == 0 and engine.version == start.version
        exact = {head for head in plans if first and head in start.exact_heads}
        starts = {head: engine.positions[head] if head in exact else engine.start_head(head) for head in plans}
        saved = {head: self._cuts.newest for head in plans.keys() - afresh if head in self._cuts.heads_saved}
        begins = {head: JoinReply(starts[head], checkpoint=start.checkpoint_version, exact=True) for head in exact}
        for head in plans.keys() - exact:
            reference = await self._updates.reference(head) if starts[head].sequence else None
            begins[head] = JoinReply(starts[head], reference, saved.get(head))
        await until(lambda: True)
        self._records.present |= plans.keys()
        update = replace(await self._updates.since(tuple(plans), -1), join_replies=begins)
        if exact and update.version != start.version:  # they went on just now
            return await self.join(plans, incarnation)
        self._exact -= plans.keys()
        await until(lambda: not self._exact & engine.live)
        return update

    async def submit(self, contribution: Contribution, numbers: tuple[int, ...], have: int) -> CoordinatorReply:
        """A head's contribution; answered when it is merged or refused.

        Args:
            contribution: its `buffer` holds a handle for each group.
            numbers: the heads of its process, which follows one version with all of them.
            have: the version from which it can redo merges.

        Raises:
            PolicyError: the merge policy failed; every waiting head is told.
        """
        verdict = await self._merging.submit(contribution)
        inject("answers", version=self._engine.version)
        return replace(await self._updates.since(numbers, have), result=verdict)

    async def wait_for_version(self, numbers: tuple[int, ...], version: int, have: int) -> CoordinatorReply:
        """Answered as soon as there is a version newer than `version`, whatever becomes of the heads' contributions."""
        await self._merging.wait_for_version(version)
        return await self._updates.since(numbers, have)

    async def leave(self, head: int) -> None:
        """A head has ended."""
        self._merging.handle(lambda: self._engine.leave(head))

    async def lose(self, nexts: Mapping[int, int], drop: bool) -> None:
        """Processes of heads are gone, for good if they are dropped: those before the next incarnation, which is given.

        If that has joined already, this comes too late to matter.
        """
        gone = [head for head, following in nexts.items() if self._joining.get(head, (-1, None))[0] < following]
        for head in gone:
            self._records.present.discard(head)
            self._joining.pop(head, None)
            away: Callable[[int], StepResult] = self._engine.drop if drop else self._engine.lose
            self._merging.handle(lambda head=head, away=away: away(head))  # type: ignore[misc]
            if drop:
                self._masters.forget_head(head)
        for head in gone:
            self._waiters.start(self._cuts.drop_head(head))

    # -- the run ---------------------------------------------------------------------------------------------------

    async def add_checkpoint_part(self, version: int, head: int, entry: checkpoint.FileEntry | None, why: str = "") -> None:
        """A head has written its part of a checkpoint; or has none to write; or can't, and says why."""
        self._waiters.start(self._cuts.add_part(version, head, entry, why))

    async def use_evaluator(self, evaluator: Any) -> None:
        """The run's evaluator, which the driver starts when it is needed."""
        self._merging.use_evaluator(evaluator)

    async def freeze(self, early: bool) -> tuple[CheckpointRequest, ...]:
        """Nothing is merged any more, and heads wait where they are.

        Gives the checkpoints, that of the last version among them, into which the driver has heads write, whatever they do.

        Args:
            early: whether heads are on their way, so that their states differ from those in a checkpoint of that version.
        """
        self._merging.closing = True
        version, cuts, last = self._engine.version, self._cuts, self._records.last or self._first()
        there = cuts.newest == version and not early and cuts.heads_saved >= self._records.present
        if self._waiters.failure is not None:
            return ()
        if not (last is None or there or version in cuts):
            self._records.save(last)
            self._waiters.start(cuts.write_base(version, await self._masters.publish_base(references=True)))
        asked = cuts.missing_requests(self._records.present)
        cuts.take_requests(tuple(self._records.present))
        return asked

    def _first(self) -> MergeRecord | None:
        """The merge that led to the version from which this coordinator started, as far as it is known; None at version 0."""
        start, steps = self._start, [held.step for held in self._engine.positions.values()]
        if not start.version:
            return None
        taken = self._engine.step_budget.taken
        return MergeRecord(start.version, time.time(), (), 0, 0, {}, 0, 0, step=max(steps, default=0), taken=taken)

    async def data_positions(self) -> tuple[dict[int, CommittedPosition], dict[str, Any]]:
        """Where the data is: what is merged of each head, and whose which batches are."""
        return dict(self._engine.positions), self._engine.assignor.state()

    async def wait_for_checkpoints(self, limit: float) -> bool:
        """Waits up to `limit` seconds for checkpoints that are being written; whether all are whole."""
        return await self._cuts.wait_until_complete(limit)

    async def finish(self) -> tuple[int, Handle, str]:
        """Called when all heads have ended: waits for the last checkpoint; gives the final version, its base, and what was
        wrong with the last checkpoint.

        Raises:
            PolicyError: the merge policy failed.
        """
        version, cuts, waiters = self._engine.version, self._cuts, self._waiters
        inject("finishes", version=version)
        base = (await self._masters.publish_base()).parts[-1]
        end = time.monotonic() + PATIENCE
        while (waiters.busy or cuts.unfinished) and waiters.failure is None and time.monotonic() < end:
            await asyncio.sleep(LOOK)
        if waiters.failure is not None:
            raise waiters.failure
        if cuts.unfinished:
            return (
                version,
                base,
                (
                    f"The checkpoints of versions {cuts.unfinished} weren't complete within {PATIENCE:g} s: a head's part is "
                    f"missing, or {self._common.directory.display} is too slow."
                ),
            )
        return version, base, cuts.trouble

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            if self._waiters.failure is not None:
                raise self._waiters.failure
            await asyncio.sleep(LOOK)

    @ray.method(concurrency_group="ctl")
    async def status(self, seen: int) -> CoordinatorStatus:
        """The merges after version `seen`, which are forgotten here once they are seen."""
        engine, merges = self._engine, self._records.after(seen)  # runs beside the default loop, so it only reads
        return CoordinatorStatus(
            engine.version,
            engine.waiting_for,
            merges,
            self._cuts.newest,
            self._merging.needs_evaluator,
            tuple(engine.members),
            tuple(head for head in tuple(self._joined) if head in engine.members and not engine.has_data(head)),
            storage.pending_problem() or self._cuts.trouble,
            self._cuts.missing_requests(self._records.present - engine.live, self._records.present),
            self._records.spike,
            tuple(self._records.refusals),
        )
