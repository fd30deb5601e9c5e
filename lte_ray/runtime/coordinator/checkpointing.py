"""Checkpoints while they are being written: the coordinator's files, one from each head, then the manifest."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.errors import StorageError
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.messages import CheckpointRequest, MergeRecord
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import Published

REQUEST_AGAIN = 30.0
"""Seconds after which heads are asked again for their parts: an answer that asked them may have been lost on its way."""

MOST_OPEN = 3
"""Checkpoints that may be in the making; while there are as many, storage is too slow, and none is begun."""


@dataclass
class _OpenCheckpoint:
    """A checkpoint in the making.

    Attributes:
        facts: for the manifest.
        save: what heads are asked for; `untold`: those that haven't been asked yet; `missing`: those whose part isn't here.
        policy: what the policy keeps.
        own: whether the coordinator's own files are written.
        begun: when it was begun, in monotonic seconds.
    """

    facts: dict[str, Any]
    save: CheckpointRequest
    untold: set[int]
    missing: set[int]
    policy: dict[str, Tensor]
    files: list[checkpoint.FileEntry] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    own: bool = False
    begun: float = field(default_factory=time.monotonic)


class CheckpointManager:
    """Collects the parts of checkpoints and commits each when it is whole. Lives on one event loop.

    A head whose process is gone, or that has moved on, is done without: it would go on from what the base holds of it.
    Storage that fails, for a head as for the coordinator, costs a checkpoint and not the run: `trouble` says so, and older
    checkpoints stay.

    Args:
        common: as every actor.
        plan: of the base.
        saved: the newest complete one; `states`: the heads whose states it holds.
    """

    def __init__(self, common: RunContext, plan: Plan, saved: int | None, states: Collection[int]) -> None:
        self._common, self._plan = common, plan
        self._open: dict[int, _OpenCheckpoint] = {}
        self.newest, self.heads_saved = saved, frozenset(states)
        self.failed = 0
        self._left: set[int] = set()  # versions that were given up, whose files still take room
        self.trouble = ""
        """Why the last one couldn't be written; empty if it could."""
        self.last_good_version: int | None = None
        """The last version before the loss rose, where the run goes back after a spike: a checkpoint from before it stays."""

    def begin_checkpoint(
        self, record: MergeRecord, save: CheckpointRequest, facts: Mapping[str, Any], policy: Mapping[str, Tensor]
    ) -> None:
        """A checkpoint of the merge's version, to which heads write a part each; `policy` is what the policy keeps."""
        settings = self._common.settings
        whole = {
            "run": settings.run,
            "step": record.step,
            "taken": record.taken,
            "lte": dataclasses.asdict(settings.lte),
            "config": self._common.run_toml,
            "losses": {str(head): loss for head, loss in record.losses.items()},
            **json.loads(json.dumps(facts)),
        }
        kept = {name: tensor.clone() for name, tensor in policy.items()}  # which goes on changing its own
        heads = set(save.sequences)
        self._open[save.version] = _OpenCheckpoint(whole, save, set(heads), heads, kept)

    def __contains__(self, version: object) -> bool:
        return version in self._open

    @property
    def unfinished(self) -> list[int]:
        """Versions of those that aren't whole."""
        return sorted(self._open)

    @property
    def full(self) -> bool:
        """Whether another one had better not be begun."""
        return len(self._open) >= MOST_OPEN

    def take_requests(self, numbers: Collection[int]) -> tuple[CheckpointRequest, ...]:
        """The checkpoints to which these heads haven't been asked to write yet: now they are."""
        found = []
        for version in self.unfinished:
            cut = self._open[version]
            if cut.untold & set(numbers):
                cut.untold -= set(numbers)
                found.append(cut.save)
        return tuple(found)

    def missing_requests(self, heads: Collection[int], late: Collection[int] = ()) -> tuple[CheckpointRequest, ...]:
        """What of these heads is missing, even where they were asked, for that may not have come to them.

        Changes nothing, so that any thread may ask.

        Args:
            heads: whose part is asked for at once.
            late: whose part is asked for where it has been missing for long.
        """
        found, now = [], time.monotonic()
        for cut in list(self._open.values()):
            asked = set(heads) | (set(late) if now - cut.begun > REQUEST_AGAIN else set())
            sequences = {head: cut.save.sequences[head] for head in cut.missing & asked}
            if sequences:
                found.append(dataclasses.replace(cut.save, sequences=sequences))
        return tuple(found)

    async def write_base(self, version: int, published: Published) -> None:
        """Writes the coordinator's part: the whole base, the references, and what the policy keeps."""
        cut, directory = self._open.get(version), self._common.directory
        if cut is None:
            return
        try:
            await self._make_room()
            base = await self._common.transport.fetch_async(published.parts[-1])
            references = {head: await self._common.transport.fetch_async(h) for head, h in published.references.items()}
            cut.files.append(await asyncio.to_thread(checkpoint.write_base, directory, version, self._plan, base))
            inject("base written", version=version)
            if references:
                cut.files.append(await asyncio.to_thread(checkpoint.write_references, directory, version, references))
            if cut.policy:
                name = self._common.settings.merge.policy
                cut.files.append(await asyncio.to_thread(checkpoint.write_policy, directory, version, name, cut.policy))
        except StorageError as error:
            self._abandon(version, error)
            return
        cut.own = True
        await self._commit(version)

    async def add_part(self, version: int, head: int, entry: checkpoint.FileEntry | None, why: str = "") -> None:
        """A head has written its file, or has none to write; with `why`, it can't."""
        cut = self._open.get(version)
        if cut is None or head not in cut.missing:
            return
        if why:
            self._abandon(version, why)
            return
        cut.missing.discard(head)
        if entry is not None:
            cut.files.append(entry)
            cut.heads.append(head)
        await self._commit(version)

    async def drop_head(self, head: int) -> None:
        """A head's process is gone."""
        for version in self.unfinished:
            await self.add_part(version, head, None)

    async def _commit(self, version: int) -> None:
        cut, directory = self._open.get(version), self._common.directory
        if cut is None or cut.missing or not cut.own:
            return
        try:
            inject("commits", version=version)
            await asyncio.to_thread(checkpoint.commit, directory, version, cut.heads, cut.files, cut.facts)
            inject("committed", version=version)
        except StorageError as error:
            self._abandon(version, error)
            return
        if self.newest is None or version > self.newest:
            self.newest, self.heads_saved = version, frozenset(cut.heads)
        self.trouble = ""
        self._open.pop(version, None)
        for older in [v for v in self._open if v < version and self._open[v].missing]:
            self._open.pop(older)  # an answer that asked for a part was lost: a newer one is whole
            self._left.add(older)
        keep = self._common.retention
        await asyncio.to_thread(checkpoint.prune, directory, keep.last, keep.best, keep.best_by, self.last_good_version)

    async def _make_room(self) -> None:
        """Removes what those have left that were given up. Not at once: heads may still write to them."""
        directory, left = self._common.directory, self._left - self._open.keys()
        self._left -= left
        if left:
            await asyncio.to_thread(checkpoint.remove_incomplete, directory, left)

    def _abandon(self, version: int, error: StorageError | str) -> None:
        self._open.pop(version, None)
        self._left.add(version)
        self.failed += 1
        self.trouble = f"checkpoint {version} couldn't be written: {error}"

    def abandon_all(self) -> None:
        """The run has failed: none of them will be whole."""
        self._open.clear()

    async def wait_until_complete(self, limit: float) -> bool:
        """Waits up to `limit` seconds; whether all are whole."""
        end = time.monotonic() + limit
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return not self._open
