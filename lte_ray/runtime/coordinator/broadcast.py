"""What follows a merge, beside the answers: its products, the record of it, its evaluation and its checkpoint.

What leads a head's process to the newest version.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace

from lte_ray.engine.coordinator.broadcast_log import BroadcastLog, alternative_bytes
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.coordinator.loss_spike import LossSpikeDetector
from lte_ray.merging.policies.trigger import get_policy_state
from lte_ray.messages import CHECKSUM_INTERVAL, CheckpointRequest, ContributionResult, CoordinatorReply, MergeDelta, MergeRecord
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import Aggregator, Published, Publisher, known
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.object_store import Handle

MOST_REFUSALS = 100
"""Refused contributions that are kept until the driver asks for them."""

SPIKE_WINDOW = 32
"""Merges whose losses a new one's is compared with."""


def due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never if `every` is 0."""
    return every > 0 and after // every > before // every


class Records:
    """Makes merges known: to heads that redo them, to the driver, the evaluator and checkpoints. Lives on one event loop.

    Args:
        common: as every actor.
        engine: decided the merges.
        masters: computes them.
        downlink: what heads get of them.
        cuts: the checkpoints that are being written.
        sizes: bytes of a contribution, by head.
        waiters: of this process.
    """

    def __init__(
        self,
        common: RunContext,
        engine: Coordinator,
        masters: Aggregator,
        downlink: BroadcastLog,
        cuts: CheckpointManager,
        sizes: Sequence[int],
        waiters: BackgroundTasks,
    ) -> None:
        self._train, self._engine, self._masters, self._downlink = common.settings.train, engine, masters, downlink
        self._cuts, self._sizes, self._waiters = cuts, sizes, waiters
        self._in_order = asyncio.Lock()
        self._unseen: tuple[MergeRecord, ...] = ()
        self._seen = engine.version
        self._best = common.retention.best > 0  # then each that is saved is evaluated
        self.last: MergeRecord | None = None
        most = common.settings.merge.rollback_z
        self._spikes = LossSpikeDetector(SPIKE_WINDOW, most) if most else None
        self.spike: tuple[str, int] | None = None
        """Why the loss counts as having spiked, and the last version before it did."""
        self.refusals: deque[tuple[int, ContributionResult]] = deque(maxlen=MOST_REFUSALS)
        """The newest refused contributions, numbered from 1."""
        self.present: set[int] = set()
        """Heads that have joined, and whose process isn't gone: they can write their state."""
        self.checksum: tuple[int, int] | None = None
        """Of the groups that heads redo from factors, and its version."""

    def note(
        self, merges: Sequence[MergeRecord], buffers: Mapping[int, tuple[Handle, ...]], tickets: Mapping[int, int]
    ) -> None:
        """Makes the merges of one event known.

        Args:
            merges: in order; at least one.
            buffers: handles of the merged contributions, by head.
            tickets: their tickets.
        """
        before, newest = merges[0].version - 1, merges[-1].version
        for merge in merges:
            version, engine = merge.version, self._engine
            redone = MergeDelta(version, merge.weights, {head: buffers[head] for head in merge.heads}, merge.fresh)
            self._downlink.append(redone if merge.weights else None)
            seconds = self._masters.merge(version, {tickets[head]: weight for head, weight in merge.weights.items()})
            record = self.last = replace(
                merge,
                bytes_up=sum(self._sizes[head] for head in merge.heads),
                bytes_down=self._downlink.bytes_down(merge.heads, len(engine.live)),
                bytes_instead=alternative_bytes(engine.plan.base.size, len(engine.members), len(merge.heads), merge.steps),
            )
            # Of several merges in one event, only the last one's base is ever seen.
            shows = version == newest and due(self._train.eval_every, before, version)
            saves = version == newest and due(self._train.checkpoint_every, before, version) and not self._cuts.full
            if saves:
                self.save(record)
            if self._spikes is not None and merge.losses:
                why = self._spikes.record_loss(sum(merge.losses.values()) / len(merge.losses))
                self._cuts.last_good_version = version - self._spikes.suspicious_merges
                if why:
                    self.spike = (why, self._cuts.last_good_version)
            shows = shows or (saves and self._best)
            base = self._masters.publish_base(references=saves) if shows or saves else None
            checked = version == newest and self._downlink.by_factors and version % CHECKSUM_INTERVAL == 0
            total = self._masters.checksum() if checked else None
            self._waiters.start(self._settle(record, seconds, total, base, shows, saves))

    def refused(self, verdict: ContributionResult) -> None:
        """A contribution couldn't be merged."""
        number = self.refusals[-1][0] + 1 if self.refusals else 1
        self.refusals.append((number, verdict))

    def save(self, record: MergeRecord) -> CheckpointRequest:
        """Begins a checkpoint of the newest version; gives what heads are to be asked."""
        engine = self._engine
        sequences = {head: engine.positions[head].sequence for head in sorted(self.present & engine.members)}
        save = CheckpointRequest(engine.version, sequences, id=time.time_ns())
        standings = {str(head): dataclasses.asdict(held) for head, held in engine.positions.items() if head in engine.members}
        facts = {"standings": standings, "ledger": engine.assignor.state(), "guard": engine.outlier_filter.state()}
        self._cuts.begin_checkpoint(record, save, facts, get_policy_state(engine.policy))
        return save

    def after(self, seen: int) -> tuple[MergeRecord, ...]:
        """The merges after version `seen`, which are forgotten once they are seen.

        May be called in another thread: it only reads what the loop replaces as a whole.
        """
        self._seen = seen
        return tuple(m for m in self._unseen if m.version > seen)

    async def _settle(
        self,
        record: MergeRecord,
        seconds: Awaitable[float],
        total: Awaitable[int] | None,
        base: Awaitable[Published] | None,
        shows: bool,
        saves: bool,
    ) -> None:
        async with self._in_order:  # the driver asks for what comes after the version that it saw last
            record = replace(record, merge_seconds=await seconds)
            if total is not None:
                self.checksum = (record.version, await total)
            if base is not None:
                published = await base
                record = replace(record, base=published.parts[-1]) if shows else record
                if saves:
                    self._waiters.start(self._cuts.write_base(record.version, published))
            self._unseen = (*(m for m in self._unseen if m.version > self._seen), record)


class Updates:
    """Makes the coordinator's answers to heads, without a verdict.

    Args:
        engine: gives the newest version, and what each head is to do.
        masters: publish the base.
        downlink: the merges that heads can redo.
        records: has the newest checksum.
        cuts: the checkpoints that are being made, which heads are told of.
        groups: how many there are.
    """

    def __init__(
        self,
        engine: Coordinator,
        masters: Aggregator,
        downlink: BroadcastLog,
        records: Records,
        cuts: CheckpointManager,
        groups: int,
    ) -> None:
        self._engine, self._downlink, self._records, self._cuts = engine, downlink, records, cuts
        self._groups, self._masters = range(groups), masters
        self._publisher = Publisher(masters, engine)

    async def reference(self, head: int) -> Handle | None:
        """The factors that the newest version holds of this head."""
        return (await self._masters.publish_parts(self._groups, references=True)).references.get(head)

    async def since(self, numbers: tuple[int, ...], have: int) -> CoordinatorReply:
        """What leads a process with these heads from version `have` (-1: from nothing) to the newest."""
        published, chain = known(self._engine), self._downlink.deltas_since(have)
        if chain is not None:
            published = await self._publisher.newest(self._downlink.dense_groups, references=False)
            chain = self._downlink.deltas_since(have)  # merges go on while parts are published
        if chain is None:
            published = await self._publisher.newest(self._groups, references=self._downlink.by_factors)
        version, engine = published.version, self._engine
        return CoordinatorReply(
            None,
            version,
            published.parts,
            tuple(merged for merged in chain or () if merged.version <= version),
            published.references,
            positions=published.positions,
            assignment_state=published.assignment_state,
            checkpoint_requests=self._cuts.take_requests(numbers),
            directives={n: engine.next_directive(n) for n in numbers},
            checksum=self._records.checksum,
        )
