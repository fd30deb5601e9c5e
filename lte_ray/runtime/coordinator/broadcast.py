"""What follows a merge, and what heads receive: bases or factors, records of merges, evaluations and checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from lte_ray.engine.coordinator.broadcast_log import BroadcastLog, alternative_bytes
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.coordinator.loss_spike import LossSpikeDetector
from lte_ray.messages import (
    CHECKSUM_INTERVAL,
    CheckpointRequest,
    ContributionResult,
    CoordinatorReply,
    MergeDelta,
    MergeRecord,
)
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import Aggregator, Published
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.object_store import Handle

MAX_REFUSALS = 100
"""Refused contributions that are kept until the driver asks for them."""

SPIKE_WINDOW = 32
"""Merges whose losses a new one's is compared with."""


def is_due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never if `every` is 0."""
    return every > 0 and after // every > before // every


class Broadcaster:
    """Publishes merges to heads, to the driver, to the evaluator and into checkpoints. Lives on one event loop.

    Args:
        context: as for every actor.
        engine: decides the merges.
        aggregator: computes and publishes them.
        checkpoints: those that are being written.
        tasks: of this process.
        has_momentum: whether the version that the engine starts from has momentum of outer steps.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Coordinator,
        aggregator: Aggregator,
        checkpoints: CheckpointManager,
        tasks: BackgroundTasks,
        has_momentum: bool = False,
    ) -> None:
        self._engine, self._aggregator, self._checkpoints, self._tasks = engine, aggregator, checkpoints, tasks
        self._train, self._never_merge = context.settings.train, context.settings.merge.never_merge
        codecs = context.codecs(engine.plans)
        base_sizes = [plan.base.size * torch.float32.itemsize for plan in codecs[0].group_plans]
        sizes = [codec.buffer_sizes for codec in codecs]
        changes = codecs[0].change_sizes
        self._log = BroadcastLog(context.groups, base_sizes, sizes, engine.version, has_momentum, changes)
        self._changes: dict[int, asyncio.Future[dict[int, Handle]]] = {}  # by version, once it is computed
        self._contribution_bytes = [sum(codec.buffer_sizes) for codec in codecs]
        self._groups = range(len(context.groups))
        self._start_version = engine.version
        self._last_record: MergeRecord | None = None
        self._record_order = asyncio.Lock()
        self._unseen: tuple[MergeRecord, ...] = ()
        self._seen = engine.version
        self._published: dict[tuple[int, ...], Published] = {}
        self._publishing = asyncio.Lock()
        self._checksum: tuple[int, int] | None = None  # of the groups that heads redo from factors, and its version
        self._evaluate_checkpoints = context.retention.best > 0
        threshold = context.settings.merge.rollback_z
        self._spikes = LossSpikeDetector(SPIKE_WINDOW, threshold) if threshold else None
        self.spike: tuple[str, int] | None = None
        """Why the loss counts as having spiked, and the last version before it did."""
        self.refusals: deque[tuple[int, ContributionResult]] = deque(maxlen=MAX_REFUSALS)
        """The newest refused contributions, numbered from 1."""
        self.reachable_heads: set[int] = set()
        """Heads that have joined, and whose process isn't gone: they can write their state."""

    # -- merges ----------------------------------------------------------------------------------------------------------

    def publish_merges(
        self, merges: Sequence[MergeRecord], buffers: Mapping[int, tuple[Handle, ...]], tickets: Mapping[int, int]
    ) -> None:
        """Has the merges of one event computed, and publishes them.

        Args:
            merges: in order; at least one.
            buffers: handles of the merged contributions, by head.
            tickets: their tickets.
        """
        before, newest = merges[0].version - 1, merges[-1].version
        for merge in merges:
            version, engine = merge.version, self._engine
            # Contributions that no head redoes aren't kept.
            of_heads = {head: buffers[head] for head in merge.weights} if self._log.factored_groups else {}
            delta = MergeDelta(version, merge.weights, of_heads, merge.fresh, merge.outer_step)
            can_redo = merge.weights or self._never_merge or not self._log.factored_groups
            self._log.append(delta if can_redo else None)
            weights = {tickets[head]: weight for head, weight in merge.weights.items()}
            seconds = self._aggregator.merge(version, weights, merge.outer_step, merge.ema_keep)
            if self._log.by_changes:
                self._publish_changes(version)
            record = self._last_record = replace(
                merge,
                bytes_up=sum(self._contribution_bytes[head] for head in merge.heads),
                bytes_down=self._log.bytes_down(merge.heads, len(engine.live)),
                alternative_bytes=alternative_bytes(engine.plan.base.size, len(engine.members), len(merge.heads), merge.steps),
            )
            # Of several merges in one event, only the last one's base is ever published.
            last = version == newest
            saves = last and is_due(self._train.checkpoint_every, before, version) and not self._checkpoints.full
            if saves:
                self._begin_checkpoint(record)
            self._detect_spike(record)
            evaluates = last and is_due(self._train.eval_every, before, version)
            evaluates = evaluates or (saves and self._evaluate_checkpoints)
            complete = saves or self._never_merge  # there the references are evaluated
            base = self._aggregator.publish_base(complete) if evaluates or saves else None
            checked = last and self._log.redone_groups and version % CHECKSUM_INTERVAL == 0
            checksum = self._aggregator.checksum() if checked else None
            self._tasks.start(self._publish_record(record, seconds, checksum, base, evaluates, saves))

    def _publish_changes(self, version: int) -> None:
        """Has the changes of the version that is the newest published, and forgets those that no reply needs any more."""
        changes: asyncio.Future[dict[int, Handle]] = self._tasks.create_future()
        changes.add_done_callback(lambda future: future.cancelled() or future.exception())  # perhaps no reply awaits it
        self._changes = {v: known for v, known in self._changes.items() if v >= self._log.oldest} | {version: changes}

        async def publish(publishing: Awaitable[dict[int, Handle]]) -> None:
            handles = await publishing
            if not changes.done():  # else the run has failed
                changes.set_result(handles)

        self._tasks.start(publish(self._aggregator.publish_changes()))

    def record_refusal(self, result: ContributionResult) -> None:
        """Keeps a refused contribution for the driver."""
        number = self.refusals[-1][0] + 1 if self.refusals else 1
        self.refusals.append((number, result))

    def merges_after(self, seen: int) -> tuple[MergeRecord, ...]:
        """The merges after version `seen`, which are forgotten once they are seen.

        May be called in another thread: it only reads what the loop replaces as a whole.
        """
        self._seen = seen
        return tuple(m for m in self._unseen if m.version > seen)

    def _detect_spike(self, record: MergeRecord) -> None:
        if self._spikes is None or not record.losses:
            return
        why = self._spikes.record_loss(sum(record.losses.values()) / len(record.losses))
        last_good = self._checkpoints.last_good_version = record.version - self._spikes.suspicious_merges
        if why:
            self.spike = (why, last_good)

    async def _publish_record(
        self,
        record: MergeRecord,
        seconds: Awaitable[float],
        checksum: Awaitable[int] | None,
        base: Awaitable[Published] | None,
        evaluates: bool,
        saves: bool,
    ) -> None:
        async with self._record_order:  # the driver asks for the versions after the one that it saw last
            record = replace(record, merge_seconds=await seconds)
            if checksum is not None:
                self._checksum = (record.version, await checksum)
            if base is not None:
                published = await base
                if evaluates:
                    adapters = published.references if self._never_merge else {}
                    record = replace(record, base=published.parts[-1], ema=published.ema.get(-1), adapters=adapters)
                if saves:
                    self._tasks.start(self._checkpoints.write_base(record.version, published))
            self._unseen = (*(m for m in self._unseen if m.version > self._seen), record)

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    async def checkpoint_last_version(self, early: bool) -> tuple[CheckpointRequest, ...]:
        """Begins a checkpoint of the last version, unless there is one.

        Args:
            early: whether heads are in the middle of a round, so that their states differ from those in a checkpoint of that
                version.

        Returns:
            What reachable heads must still write into the checkpoints that are open.
        """
        checkpoints, version = self._checkpoints, self._engine.version
        record = self._last_record or self._start_record()
        complete = checkpoints.newest == version and not early and checkpoints.heads_saved >= self.reachable_heads
        if record is not None and not complete and version not in checkpoints:
            self._begin_checkpoint(record)
            published = await self._aggregator.publish_base(complete=True)
            self._tasks.start(checkpoints.write_base(version, published))
        return checkpoints.last_requests(self.reachable_heads)

    def _begin_checkpoint(self, record: MergeRecord) -> None:
        """Begins a checkpoint of the newest version."""
        engine = self._engine
        heads = sorted(self.reachable_heads & engine.members)
        request = CheckpointRequest(engine.version, {h: engine.positions[h].sequence for h in heads}, id=time.time_ns())
        self._checkpoints.begin_checkpoint(record, request, engine.checkpoint_facts(), engine.policy_state())

    def _start_record(self) -> MergeRecord | None:
        """The merge that led to the version at which this coordinator started, as far as it is known; None at version 0."""
        if not self._start_version:
            return None
        step = max((position.step for position in self._engine.positions.values()), default=0)
        return MergeRecord(
            self._start_version, time.time(), (), 0, 0, {}, 0, 0, step=step, steps_taken=self._engine.steps_taken
        )

    # -- replies ---------------------------------------------------------------------------------------------------------

    async def reply(self, numbers: Collection[int], have: int) -> CoordinatorReply:
        """What leads a process with these heads from version `have` (-1: none) to the newest. It has no result."""
        deltas = self._log.deltas_since(have)
        if deltas is not None:
            published = await self._publish_newest(self._log.dense_groups)
            deltas = self._log.deltas_since(have)  # merges continue while parts are published
        if deltas is None:
            published = await self._publish_newest(self._groups, to_redo=bool(self._log.factored_groups))
        version = published.version
        deltas = await self._with_changes([delta for delta in deltas or () if delta.version <= version])
        return CoordinatorReply(
            None,
            version,
            published.parts,
            deltas,
            published.references,
            published.momentum,
            positions=published.positions,
            assignment_state=published.assignment_state,
            checkpoint_requests=self._checkpoints.requests_in_reply(numbers),
            directives={n: self._engine.next_directive(n) for n in numbers},
            checksum=self._checksum,
        )

    async def _with_changes(self, deltas: Sequence[MergeDelta]) -> tuple[MergeDelta, ...]:
        if not self._log.by_changes:
            return tuple(deltas)
        changes = [self._changes[delta.version] for delta in deltas]
        return tuple([replace(delta, changes=await each) for delta, each in zip(deltas, changes, strict=True)])

    async def publish_reference(self, head: int) -> Handle | None:
        """Publishes the factors that the newest version holds of this head; None where B' = 0."""
        return (await self._aggregator.publish_parts(self._groups, references=True)).references.get(head)

    async def _publish_newest(self, groups: Sequence[int], to_redo: bool = False) -> Published:
        """Publishes these groups' parts of the newest version, each version once.

        With `to_redo`, also all references and the momentum, for processes that redo the merges that follow.
        """
        key = (*groups, -1) if to_redo else tuple(groups)
        if not key:
            return self._without_base()
        async with self._publishing:  # callers that come meanwhile get this one, or wait for the next
            last = self._published.get(key)
            if last is None or last.version < self._engine.version:
                momentum = self._log.factored_groups if to_redo else ()
                known, parts = self._without_base(), self._aggregator.publish_parts(groups, to_redo, momentum)  # of one version
                last = replace(await parts, positions=known.positions, assignment_state=known.assignment_state)
                self._published[key] = last
        return last

    def _without_base(self) -> Published:
        """What the newest version holds, without its base."""
        engine = self._engine
        return Published(engine.version, positions=dict(engine.positions), assignment_state=engine.assignment_state())
