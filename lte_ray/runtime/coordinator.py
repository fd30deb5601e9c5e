"""The coordinator's process: a thin shell around `engine.Coordinator`, as an asyncio actor.

No head's call blocks another's: each waits for its own future. The loop decides by numbers; products are computed in a thread
beside it, or in shards. `status` runs on a loop of its own. `ray.remote` is applied in `session`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.downlink import Downlink
from lte_ray.errors import StorageError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.merging.scheduled import load_state_of, state_of
from lte_ray.messages import Contribution, MergeRecord, Update
from lte_ray.runtime.common import Common
from lte_ray.runtime.cuts import Cuts
from lte_ray.runtime.merging import Merging
from lte_ray.runtime.own import OwnMaster
from lte_ray.runtime.package import Package
from lte_ray.runtime.publisher import Masters
from lte_ray.runtime.records import Records
from lte_ray.runtime.shards import Shards
from lte_ray.runtime.transport import Handle
from lte_ray.runtime.updates import Updates
from lte_ray.runtime.waiters import Waiters

PATIENCE = 600.0
"""Seconds to wait at the end of a run for checkpoints that are being written."""


@dataclass(frozen=True)
class CoordinatorStatus:
    """The merges since the driver last asked, the newest checkpoint, and whether the policy needs the evaluator."""

    version: int
    waiting_for: str
    merges: tuple[MergeRecord, ...]
    checkpoint: int | None
    needs_evaluator: bool = False


class CoordinatorActor:
    """Merges, answers heads, and completes checkpoints.

    Args:
        common: as every actor.
        plans: each head's, of the model that the driver built.
        policy: the merge policy.
        base: version `version` of the base, flat (a numpy array); None where it is in `shards`.
        keep: how many checkpoints to keep.
        shards: the `ShardActor`s by their number, where merging is spread over several.
    """

    def __init__(
        self,
        common: Common,
        plans: tuple[Plan, ...],
        policy: Package,
        base: Any,
        version: int,
        keep: int | None,
        shards: Sequence[Any] = (),
    ) -> None:
        self._common, settings = common, common.settings
        threads = common.threads(plans[0], plans[0])
        references: dict[int, Tensor] = {}
        taken = {}
        for head, step, factors in common.saved_heads():
            taken[head] = step
            if factors is not None and not shards:
                references[head] = factors
        self._engine = Coordinator(
            settings,
            plans[0],
            None if shards else torch.tensor(base),  # a copy: what came in is shared and read-only
            policy.open(),
            plans=plans,
            version=version,
            references=references,
            taken=taken,
        )
        if common.resume is not None:
            kept = checkpoint.read_policy(common.directory, common.resume, settings.merge.policy)
            if kept:
                load_state_of(self._engine.policy, kept)
        self._joined: set[int] = set()
        self._all_joined = asyncio.Event()
        codecs = common.codecs(plans)
        self._masters: Masters = Shards(shards, codecs, version) if shards else OwnMaster(common, self._engine, codecs, threads)
        self._cuts = Cuts(common, plans[0], keep)
        self._waiters = Waiters(self._cuts.abandon)
        parts = [part.base.size * torch.float32.itemsize for part in codecs[0].parts]
        sizes = [codec.sizes for codec in codecs]
        downlink = Downlink(common.groups, parts, sizes, version)
        self._records = Records(
            common, self._engine, self._masters, downlink, self._cuts, [sum(each) for each in sizes], self._waiters
        )
        self._updates = Updates(self._engine, self._masters, downlink, self._records, len(common.groups))
        self._merging = Merging(self._engine, self._masters, self._records, self._waiters, common.transport, threads)

    # -- heads -----------------------------------------------------------------------------------------------------

    async def join(self, plans: Mapping[int, Plan]) -> Update:
        """Heads ask for the base to start from; `plans` are those of the models that they built.

        Raises:
            WorkerFailed: one isn't the model that the driver built.
        """
        for head, plan in plans.items():
            ours = self._engine.plans[head]
            if plan != ours:
                differing = sorted(str(e) for e in {*plan.base.entries} ^ {*ours.base.entries})[:4]
                reason = f"build_model() gives another model here than in the driver; they differ in {differing}."
                raise WorkerFailed(f"head {head}", None, reason)
        self._joined |= plans.keys()
        if self._joined >= self._engine.live:
            self._all_joined.set()
        if self._engine.budget.shared:  # else whoever comes first takes the steps of those who are still starting
            await self._all_joined.wait()
        return await self._updates.since(tuple(plans), -1)

    async def submit(self, contribution: Contribution, numbers: tuple[int, ...], have: int) -> Update:
        """A head's contribution; answered when it is merged or refused.

        Args:
            contribution: its `buffer` holds a handle for each group.
            numbers: the heads of its process, which follows one version with all of them.
            have: the version from which it can redo merges.

        Raises:
            PolicyError: the merge policy failed; every waiting head is told.
        """
        verdict, checkpoints = await self._merging.contribute(contribution)
        return replace(await self._updates.since(numbers, have), verdict=verdict, checkpoint=checkpoints)

    async def newer(self, numbers: tuple[int, ...], version: int, have: int) -> Update:
        """Answered as soon as there is a version newer than `version`, whatever becomes of the heads' contributions."""
        await self._merging.newer(version)
        return await self._updates.since(numbers, have)

    async def leave(self, head: int) -> None:
        """A head has ended."""
        self._merging.leave(head)

    # -- the run ---------------------------------------------------------------------------------------------------

    async def saved(self, version: int, head: int, entry: checkpoint.FileEntry) -> None:
        """A head has written its part of a checkpoint."""
        self._waiters.background(self._cuts.add(version, entry))

    async def use_evaluator(self, evaluator: Any) -> None:
        """The run's evaluator, which the driver starts when it is needed."""
        self._merging.use_evaluator(evaluator)

    async def finish(self) -> tuple[int, Handle]:
        """Called when all heads have ended: waits for the last checkpoint, and gives the final version and its base.

        Raises:
            StorageError: a checkpoint couldn't be completed.
            PolicyError: the merge policy failed.
        """
        version, cuts, waiters = self._engine.version, self._cuts, self._waiters
        base = await self._masters.whole()
        if self._records.last is not None and cuts.saved != version and version not in cuts:
            cuts.begin(
                self._records.last, (), state_of(self._engine.policy)
            )  # the policy left heads out of the last merge: the base alone
            waiters.background(cuts.write_base(version, base))
        end = time.monotonic() + PATIENCE
        while (waiters.busy or cuts.unfinished) and waiters.failure is None and time.monotonic() < end:
            await asyncio.sleep(0.005)
        if cuts.unfinished and waiters.failure is None:
            raise StorageError(
                f"The checkpoints of versions {cuts.unfinished} weren't complete within {PATIENCE:g} s: a head's part is "
                f"missing, or {self._common.directory.display} is too slow."
            )
        if waiters.failure is not None:
            raise waiters.failure
        return version, base

    async def close(self, limit: float) -> None:
        """The run ends early: nothing is merged any more, and heads wait where they are, so that none writes while it is
        killed. Checkpoints that are being written get up to `limit` seconds."""
        self._merging.closing = True
        await self._cuts.complete(limit)

    @ray.method(concurrency_group="ctl")
    async def status(self, seen: int) -> CoordinatorStatus:
        """The merges after version `seen`, which are forgotten here once they are seen."""
        engine, merges = self._engine, self._records.after(seen)  # runs beside the default loop, so it only reads
        needs = self._merging.needs_evaluator
        return CoordinatorStatus(engine.version, engine.waiting_for, merges, self._cuts.saved, needs)
