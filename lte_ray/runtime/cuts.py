"""Checkpoints while they are being written: one file from the coordinator, one from each head, then the manifest."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.layout import Plan
from lte_ray.messages import MergeRecord
from lte_ray.runtime.common import Common
from lte_ray.runtime.transport import Handle


@dataclass
class _Cut:
    """A checkpoint in the making: the merge it follows, the heads that write a part, and the files there are and will be."""

    record: MergeRecord
    heads: tuple[int, ...]
    files: list[checkpoint.FileEntry]
    expected: int


class Cuts:
    """Collects the parts of checkpoints and commits each when it is whole. Lives on one event loop.

    Args:
        common: as every actor.
        plan: of the base.
        keep: how many checkpoints to keep.
    """

    def __init__(self, common: Common, plan: Plan, keep: int | None) -> None:
        self._common, self._plan, self._keep = common, plan, keep
        self._open: dict[int, _Cut] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}  # by version, until it is written
        self.saved: int | None = common.resume.version if common.resume else None
        """The newest complete one."""

    def begin(self, record: MergeRecord, heads: tuple[int, ...], policy: Mapping[str, Tensor]) -> None:
        """A checkpoint of the merge's version, to which `heads` write a part each; `policy` is what the policy keeps."""
        kept = {name: tensor.clone() for name, tensor in policy.items()}  # which goes on changing its own
        self._open[record.version] = _Cut(record, heads, [], len(heads) + 1 + bool(kept))
        self._kept[record.version] = kept

    def __contains__(self, version: object) -> bool:
        return version in self._open

    @property
    def unfinished(self) -> list[int]:
        """Versions of those that aren't whole."""
        return sorted(self._open)

    def abandon(self) -> None:
        """Storage failed: none of them will be whole."""
        self._open.clear()
        self._kept.clear()

    async def write_base(self, version: int, base: Handle) -> None:
        """Writes the coordinator's part: the whole base, and what the policy keeps."""
        flat = await self._common.transport.arrive(base)
        directory, kept = self._common.directory, self._kept.pop(version, {})
        entry = await asyncio.to_thread(checkpoint.write_base, directory, version, self._plan, flat)
        await self.add(version, entry)
        if kept:
            name = self._common.settings.merge.policy
            await self.add(version, await asyncio.to_thread(checkpoint.write_policy, directory, version, name, kept))

    async def add(self, version: int, entry: checkpoint.FileEntry) -> None:
        """Adds a file that was written, and commits the checkpoint if it was the last one missing."""
        cut = self._open.get(version)
        if cut is None:  # storage failed for another part of it
            return
        cut.files.append(entry)
        if len(cut.files) < cut.expected:
            return
        directory, record, settings = self._common.directory, cut.record, self._common.settings
        facts = {
            "run": settings.run,
            "step": record.step,
            "taken": record.taken,
            "lte": dataclasses.asdict(settings.lte),
            "losses": record.losses,
        }
        await asyncio.to_thread(checkpoint.commit, directory, version, cut.heads, cut.files, facts)
        await asyncio.to_thread(checkpoint.prune, directory, self._keep)
        self.saved = max(version, self.saved or 0)
        del self._open[version]

    async def complete(self, limit: float) -> bool:
        """Waits up to `limit` seconds; whether all are whole."""
        end = time.monotonic() + limit
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return not self._open
