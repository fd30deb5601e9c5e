"""The coordinator's process: a thin shell around `engine.Coordinator`, as an asyncio actor.

No head's call blocks another's: each waits for its own future, and merging is the only thing done on the loop. `status`
runs on a loop of its own. `ray.remote` is applied in `session`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from lte_ray import checkpoint
from lte_ray.engine.coordinator import Coordinator, Outcome
from lte_ray.engine.threads import merge_threads, torch_threads
from lte_ray.errors import StorageError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.messages import Contribution, MergeRecord, Update, Verdict
from lte_ray.runtime.common import Common
from lte_ray.runtime.package import Package
from lte_ray.runtime.transport import Handle

PATIENCE = 600.0
"""Seconds to wait at the end of a run for checkpoints that are being written."""


@dataclass(frozen=True)
class CoordinatorStatus:
    """What the driver asks for a few times a second: the merges since it last asked, and the newest checkpoint."""

    version: int
    waiting_for: str
    merges: tuple[MergeRecord, ...]
    checkpoint: int | None


@dataclass
class _Cut:
    """A checkpoint that is being written: the merge it follows, the heads that write a part, and the files there are."""

    record: MergeRecord
    heads: tuple[int, ...]
    files: list[checkpoint.FileEntry]


def due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never if `every` is 0."""
    return every > 0 and after // every > before // every


class CoordinatorActor:
    """Merges, publishes each new base once, answers heads, and completes checkpoints.

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
        self._common, self._keep = common, keep
        self._threads = merge_threads(common.settings.merge.merge_threads, plans[0], common.settings.lte.num_heads)
        references = {}
        if common.resume is not None:
            for head in common.resume.heads:
                tensors, _ = checkpoint.read_head(common.directory, common.resume, head)
                if "reference" in tensors:
                    references[head] = tensors["reference"]
        master = torch.tensor(base)  # a copy: what came in is shared and read-only
        self._engine = Coordinator(
            common.settings, plans[0], master, policy.open(), plans=plans, version=version, references=references
        )
        self._published: Handle = common.transport.publish(master)
        self._answers: dict[tuple[int, int], asyncio.Future[Update]] = {}
        self._unseen: tuple[MergeRecord, ...] = ()
        self._seen = version
        self._last: MergeRecord | None = None
        self._cuts: dict[int, _Cut] = {}
        self._saved: int | None = common.resume.version if common.resume else None
        self._failure: Exception | None = None
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, head: int, plan: Plan) -> Update:
        """A head asks for the base to start from; `plan` is that of the model it built.

        Raises:
            WorkerFailed: it isn't the model that the driver built.
        """
        ours = self._engine.plans[head]
        if plan != ours:
            differing = sorted(str(e) for e in {*plan.base.entries} ^ {*ours.base.entries})[:4]
            reason = f"build_model() gives another model here than in the driver; they differ in {differing}."
            raise WorkerFailed(f"head {head}", None, reason)
        return Update(Verdict(head, 0, True, self._engine.version), self._engine.version, self._published)

    async def submit(self, contribution: Contribution) -> Update:
        """A head's contribution; answered when it is merged or refused.

        Raises:
            PolicyError: the merge policy failed; every waiting head is told.
        """
        buffer = await self._common.transport.arrive(contribution.buffer)
        answer: asyncio.Future[Update] = asyncio.get_running_loop().create_future()
        self._answers[contribution.head, contribution.sequence] = answer
        self._handle(lambda: self._engine.receive(contribution, buffer))
        return await answer

    async def leave(self, head: int) -> None:
        """A head has ended."""
        self._handle(lambda: self._engine.leave(head))

    def _handle(self, event: Callable[[], Outcome]) -> None:
        if self._closing:
            return
        try:
            if self._failure is not None:
                raise self._failure
            before = self._engine.version
            with torch_threads(self._threads):
                outcome = event()
            cut = self._publish(before, outcome.merges) if outcome.merges else None
            self._answer(outcome.verdicts, cut)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error  # what follows from the first is no news
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def _publish(self, before: int, merges: tuple[MergeRecord, ...]) -> MergeRecord | None:
        """Publishes the newest base; gives the merge that a checkpoint is due for, if it is."""
        train = self._common.settings.train
        *earlier, last = merges  # of several merges in one event, only the last one's base is ever seen
        self._published = self._common.transport.publish(self._engine.base)
        shown = replace(last, base=self._published) if due(train.eval_every, before, last.version) else last
        self._unseen = (*(m for m in self._unseen if m.version > self._seen), *earlier, shown)
        self._last = last
        if not due(train.checkpoint_every, before, last.version) and last.step < train.steps:
            return None
        self._begin(_Cut(last, last.heads, []))
        return last

    def _answer(self, verdicts: tuple[Verdict, ...], cut: MergeRecord | None) -> None:
        for verdict in verdicts:
            saves = cut is not None and verdict.accepted and verdict.head in cut.heads
            update = Update(verdict, self._engine.version, self._published, checkpoint=saves)
            self._answers.pop((verdict.head, verdict.sequence)).set_result(update)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _begin(self, cut: _Cut) -> None:
        version, handle = cut.record.version, self._published
        self._cuts[version] = cut

        async def write() -> None:
            base = await self._common.transport.arrive(handle)
            plan, directory = self._engine.plan, self._common.directory
            await self._add(version, await asyncio.to_thread(checkpoint.write_base, directory, version, plan, base))

        self._background(write())

    async def saved(self, version: int, head: int, entry: checkpoint.FileEntry) -> None:
        """A head has written its part of a checkpoint."""
        self._background(self._add(version, entry))

    async def _add(self, version: int, entry: checkpoint.FileEntry) -> None:
        """Adds a file that was written, and commits the checkpoint if it was the last one missing."""
        cut = self._cuts.get(version)
        if cut is None:  # storage failed for another part of it
            return
        cut.files.append(entry)
        if len(cut.files) < len(cut.heads) + 1:
            return
        directory, record = self._common.directory, cut.record
        settings = self._common.settings
        facts = {
            "run": settings.run,
            "step": record.step,
            "lte": dataclasses.asdict(settings.lte),
            "losses": record.losses,
        }
        await asyncio.to_thread(checkpoint.commit, directory, version, cut.heads, cut.files, facts)
        await asyncio.to_thread(checkpoint.prune, directory, self._keep)
        self._saved = max(version, self._saved or 0)
        del self._cuts[version]

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._cuts.clear()  # storage failed: none of them will be complete
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
        if self._last is not None and self._saved != version and version not in self._cuts:
            self._begin(_Cut(self._last, (), []))  # the policy left heads out of the last merge: the base alone
        if not await self._complete(PATIENCE) and self._failure is None:
            raise StorageError(
                f"The checkpoints of versions {sorted(self._cuts)} weren't complete within {PATIENCE:g} s: a head's part is "
                f"missing, or {self._common.directory.display} is too slow."
            )
        if self._failure is not None:
            raise self._failure
        return version, self._published

    async def close(self, limit: float) -> None:
        """The run ends early: nothing is merged any more, and heads wait where they are, so that none writes while it is
        killed. Checkpoints that are being written get up to `limit` seconds."""
        self._closing = True
        await self._complete(limit)

    async def _complete(self, limit: float) -> bool:
        end = time.monotonic() + limit
        while self._cuts and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return not self._cuts

    @ray.method(concurrency_group="ctl")
    async def status(self, seen: int) -> CoordinatorStatus:
        """The merges after version `seen`, which are forgotten here once they are seen."""
        self._seen = seen  # runs beside the default loop, so it only reads what that loop replaces as a whole
        unseen = tuple(m for m in self._unseen if m.version > seen)
        return CoordinatorStatus(self._engine.version, self._engine.waiting_for, unseen, self._saved)
