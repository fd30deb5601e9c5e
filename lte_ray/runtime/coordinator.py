"""The coordinator's process: a thin shell around `engine.Coordinator`, as an asyncio actor.

No head's call blocks another's: each waits for its own future. The loop decides by numbers; products are computed in a thread
beside it. `status` runs on a loop of its own. `ray.remote` is applied in `session`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.coordinator import Coordinator, Outcome
from lte_ray.engine.downlink import CHECK_EVERY, Downlink, bytes_instead
from lte_ray.engine.threads import merge_threads, torch_threads
from lte_ray.errors import LTEError, StorageError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.merging.flat import views
from lte_ray.merging.transfer import Codec, checksum
from lte_ray.messages import Contribution, Merged, MergeRecord, Update, Verdict
from lte_ray.runtime.common import Common
from lte_ray.runtime.cuts import Cuts
from lte_ray.runtime.package import Package
from lte_ray.runtime.publisher import Published, Publisher
from lte_ray.runtime.transport import Handle

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


def due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never if `every` is 0."""
    return every > 0 and after // every > before // every


class CoordinatorActor:
    """Merges, answers heads, and completes checkpoints.

    Args:
        common: as every actor.
        plans: each head's, of the model that the driver built.
        policy: the merge policy.
        base: version `version` of the base, flat (a numpy array).
        keep: how many checkpoints to keep.
    """

    def __init__(
        self, common: Common, plans: tuple[Plan, ...], policy: Package, base: Any, version: int, keep: int | None
    ) -> None:
        self._common, settings = common, common.settings
        self._threads = merge_threads(settings.merge.merge_threads, plans[0], settings.lte.num_heads)
        references, taken = {}, {}
        if common.resume is not None:
            for head in common.resume.heads:
                tensors, meta = checkpoint.read_head(common.directory, common.resume, head)
                taken[head] = meta["step"]
                if "reference" in tensors:
                    references[head] = tensors["reference"]
        master = torch.tensor(base)  # a copy: what came in is shared and read-only
        self._engine = Coordinator(
            settings,
            plans[0],
            master,
            policy.open(),
            plans=plans,
            version=version,
            references=references,
            taken=taken,
        )
        self._codecs = [Codec(plan, common.groups, settings.merge) for plan in plans]
        sizes = [part.base.size * master.itemsize for part in self._codecs[0].parts]
        self._downlink = Downlink(common.groups, sizes, [codec.sizes for codec in self._codecs], version)
        self._beside = ThreadPoolExecutor(1, "merge")
        self._publisher = Publisher(common.transport, self._codecs[0], self._engine.master, self._beside, self._threads)
        self._cuts = Cuts(common, plans[0], keep)
        self._handles: dict[int, tuple[Handle, ...]] = {}  # of the contributions that aren't decided
        self._answers: dict[tuple[int, int], asyncio.Future[tuple[Verdict, bool]]] = {}
        self._behind: list[tuple[int, asyncio.Future[None]]] = []  # who waits for a version
        self._checksum: tuple[int, int] | None = None
        self._unseen: tuple[MergeRecord, ...] = ()
        self._seen = version
        self._last: MergeRecord | None = None
        self._evaluator: Any = None
        self._evaluator_there = asyncio.Event()
        self._trying = False
        self._alarm: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

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
        return await self._update(tuple(plans), -1)

    async def submit(self, contribution: Contribution, numbers: tuple[int, ...], have: int) -> Update:
        """A head's contribution; answered when it is merged or refused.

        Args:
            contribution: its `buffer` holds a handle for each group.
            numbers: the heads of its process, which follows one version with all of them.
            have: the version from which it can redo merges.

        Raises:
            PolicyError: the merge policy failed; every waiting head is told.
        """
        head, handles = contribution.head, contribution.buffer
        buffers = [await self._common.transport.arrive(handle) for handle in handles]
        answer: asyncio.Future[tuple[Verdict, bool]] = asyncio.get_running_loop().create_future()
        self._answers[head, contribution.sequence] = answer
        try:
            # Nobody changes the reference meanwhile: it is this head's, which has nothing else outstanding.
            flat = self._codecs[head].decode(dict(enumerate(buffers)), self._engine.reference(head))
        except ValueError as error:
            refused = Verdict(head, contribution.sequence, False, self._engine.version, f"it can't be decoded: {error}")
            self._answer(Outcome((refused,), ()), ())
        else:
            self._handles[head] = handles
            self._handle(lambda: self._engine.receive(contribution, flat))
        verdict, checkpoints = await answer
        return replace(await self._update(numbers, have), verdict=verdict, checkpoint=checkpoints)

    async def newer(self, numbers: tuple[int, ...], version: int, have: int) -> Update:
        """Answered as soon as there is a version newer than `version`, whatever becomes of the heads' contributions."""
        if self._engine.version <= version:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._behind.append((version, waiting))
            await waiting
        return await self._update(numbers, have)

    async def leave(self, head: int) -> None:
        """A head has ended."""
        self._handle(lambda: self._engine.leave(head))

    async def _update(self, numbers: tuple[int, ...], have: int) -> Update:
        """What leads a process with these heads from version `have` to the newest."""
        published, chain = Published(self._engine.version), self._downlink.chain(have)
        if chain is not None:
            published = await self._publisher.newest(self._downlink.dense, references=False)
            chain = self._downlink.chain(have)  # merges go on while parts are published
        if chain is None:
            published = await self._publisher.newest(range(len(self._common.groups)), references=self._downlink.factored)
        version, engine = published.version, self._engine
        return Update(
            None,
            version,
            published.parts,
            tuple(merged for merged in chain or () if merged.version <= version),
            published.references,
            accepted={n: v.sequence for n in numbers if (v := engine.accepted.get(n)) is not None and v.version <= version},
            orders={n: engine.order(n) for n in numbers},
            checksum=self._checksum,
        )

    # -- merging ---------------------------------------------------------------------------------------------------

    def _handle(self, event: Callable[[], Outcome]) -> None:
        if self._closing:
            return
        try:
            if self._failure is not None:
                raise self._failure
            with torch_threads(self._threads):
                outcome = event()
            saving = self._note(outcome.merges) if outcome.merges else ()
            self._answer(outcome, saving)
            self._wake()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error  # what follows from the first is no news
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *(future for _, future in self._behind)]
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _note(self, merges: tuple[MergeRecord, ...]) -> tuple[int, ...]:
        """Makes the merges known; gives the heads that are to save their state."""
        train, master = self._common.settings.train, self._engine.master
        saving: tuple[int, ...] = ()
        before = merges[0].version - 1
        for merge in merges:
            version = merge.version
            live = len(self._engine.live)
            buffers = {head: self._handles.pop(head) for head in merge.heads}
            self._downlink.add(Merged(version, merge.weights, buffers) if merge.weights else None)
            record = replace(
                merge,
                bytes_up=sum(sum(self._codecs[head].sizes) for head in merge.heads),
                bytes_down=self._downlink.bytes_down(merge.heads, live),
                bytes_instead=bytes_instead(self._engine.plan.base.size, len(self._engine.plans), len(merge.heads), merge.steps),
            )
            last = version == merges[-1].version  # of several merges in one event, only the last one's base is ever seen
            shows = last and due(train.eval_every, before, version)
            saves = last and (
                due(train.checkpoint_every, before, version) or (record.step >= train.steps and not self._engine.budget.shared)
            )
            if saves:
                # Only heads that have all adopted this version give a state to go on from; else the base alone is saved.
                saving = record.heads if set(record.heads) >= self._engine.live else ()
                self._cuts.begin(record, saving)
            snapshot = master.at(version, torch.clone) if shows or saves else None
            sums = master.at(version, self._sum) if self._downlink.factored and version % CHECK_EVERY == 0 else None
            self._last = record
            self._background(self._settle(record, snapshot, sums, shows, saves))
        for version, waiting in self._behind:
            if version < self._engine.version and not waiting.done():
                waiting.set_result(None)
        self._behind = [(version, waiting) for version, waiting in self._behind if not waiting.done()]
        return saving

    async def _settle(
        self, record: MergeRecord, snapshot: Future[Tensor] | None, sums: Future[int] | None, shows: bool, saves: bool
    ) -> None:
        """What follows a merge, beside the answers: its products, the record of it, its evaluation and its checkpoint."""
        loop, master = asyncio.get_running_loop(), self._engine.master
        await loop.run_in_executor(self._beside, self._catch_up)
        record = replace(record, merge_seconds=master.seconds(record.version))
        if sums is not None:
            self._checksum = (record.version, sums.result())
        if snapshot is not None:
            base = snapshot.result()
            if shows:
                record = replace(record, base=self._publisher.whole(base))
            if saves:
                self._background(self._cuts.write_base(record.version, base))
        self._unseen = (*(m for m in self._unseen if m.version > self._seen), record)

    def _catch_up(self) -> None:
        with torch_threads(self._threads):
            self._engine.master.catch_up()

    def _sum(self, base: Tensor) -> int:
        entries = views(self._engine.plan.base, base)
        names = [name for group in self._common.groups if group.by_factors for name in group.names]
        return sum(checksum(entries[name]) for name in names) % 2**64

    def _answer(self, outcome: Outcome, saving: tuple[int, ...]) -> None:
        for verdict in outcome.verdicts:
            self._handles.pop(verdict.head, None)
            saves = verdict.accepted and verdict.head in saving
            self._answers.pop((verdict.head, verdict.sequence)).set_result((verdict, saves))

    # -- what the policy waits for -----------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Sets the alarm for the time at which the policy wants to be asked, and publishes what it tries."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._engine.wakes_at is not None:
            left = max(0.0, self._engine.wakes_at - time.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(left, self._handle, self._engine.tick)
        if self._engine.candidate is not None and not self._trying:
            self._trying = True
            self._background(self._try(self._engine.candidate))

    async def _try(self, candidate: Tensor) -> None:
        """Has the base that the policy tries evaluated."""
        handle = self._publisher.whole(candidate)
        await self._evaluator_there.wait()
        try:
            values = await self._evaluator.evaluate.remote(handle)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LTEError) else error) from None
        self._trying = False
        self._handle(lambda: self._engine.judged(values))

    async def use_evaluator(self, evaluator: Any) -> None:
        """The run's evaluator, which the driver starts when it is needed."""
        self._evaluator = evaluator
        self._evaluator_there.set()

    # -- the run ---------------------------------------------------------------------------------------------------

    async def saved(self, version: int, head: int, entry: checkpoint.FileEntry) -> None:
        """A head has written its part of a checkpoint."""
        self._background(self._cuts.add(version, entry))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._cuts.abandon()
                self._fail(error)

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> tuple[int, Handle]:
        """Called when all heads have ended: waits for the last checkpoint, and gives the final version and its base.

        Raises:
            StorageError: a checkpoint couldn't be completed.
            PolicyError: the merge policy failed.
        """
        version = self._engine.version
        base = self._engine.base.clone()
        if self._last is not None and self._cuts.saved != version and version not in self._cuts:
            self._cuts.begin(self._last, ())  # the policy left heads out of the last merge: the base alone
            self._background(self._cuts.write_base(version, base))
        end = time.monotonic() + PATIENCE
        while (self._tasks or self._cuts.unfinished) and self._failure is None and time.monotonic() < end:
            await asyncio.sleep(0.005)
        if self._cuts.unfinished and self._failure is None:
            raise StorageError(
                f"The checkpoints of versions {self._cuts.unfinished} weren't complete within {PATIENCE:g} s: a head's part is "
                f"missing, or {self._common.directory.display} is too slow."
            )
        if self._failure is not None:
            raise self._failure
        return version, self._publisher.whole(base)

    async def close(self, limit: float) -> None:
        """The run ends early: nothing is merged any more, and heads wait where they are, so that none writes while it is
        killed. Checkpoints that are being written get up to `limit` seconds."""
        self._closing = True
        await self._cuts.complete(limit)

    @ray.method(concurrency_group="ctl")
    async def status(self, seen: int) -> CoordinatorStatus:
        """The merges after version `seen`, which are forgotten here once they are seen."""
        self._seen = seen  # runs beside the default loop, so it only reads what that loop replaces as a whole
        unseen = tuple(m for m in self._unseen if m.version > seen)
        needs = self._trying and self._evaluator is None
        return CoordinatorStatus(self._engine.version, self._engine.waiting_for, unseen, self._cuts.saved, needs)
