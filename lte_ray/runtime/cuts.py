"""Checkpoints while they are being written: one file from the coordinator, one from each head, then the manifest."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from dataclasses import dataclass

from lte_ray import checkpoint
from lte_ray.layout import Plan
from lte_ray.messages import MergeRecord
from lte_ray.runtime.common import Common
from lte_ray.runtime.transport import Handle


@dataclass
class _Cut:
    """A checkpoint in the making: the merge it follows, the heads that write a part, and the files there are."""

    record: MergeRecord
    heads: tuple[int, ...]
    files: list[checkpoint.FileEntry]


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
        self.saved: int | None = common.resume.version if common.resume else None
        """The newest complete one."""

    def begin(self, record: MergeRecord, heads: tuple[int, ...]) -> None:
        """A checkpoint of the merge's version, to which `heads` write a part each."""
        self._open[record.version] = _Cut(record, heads, [])

    def __contains__(self, version: object) -> bool:
        return version in self._open

    @property
    def unfinished(self) -> list[int]:
        """Versions of those that aren't whole."""
        return sorted(self._open)

    def abandon(self) -> None:
        """Storage failed: none of them will be whole."""
        self._open.clear()

    async def write_base(self, version: int, base: Handle) -> None:
        """Writes the coordinator's part: the whole base."""
        flat = await self._common.transport.arrive(base)
        entry = await asyncio.to_thread(checkpoint.write_base, self._common.directory, version, self._plan, flat)
        await self.add(version, entry)

    async def add(self, version: int, entry: checkpoint.FileEntry) -> None:
        """Adds a file that was written, and commits the checkpoint if it was the last one missing."""
        cut = self._open.get(version)
        if cut is None:  # storage failed for another part of it
            return
        cut.files.append(entry)
        if len(cut.files) < len(cut.heads) + 1:
            return
        directory, record, settings = self._common.directory, cut.record, self._common.settings
        facts = {
            "run": settings.run,
            "step": record.step,
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
