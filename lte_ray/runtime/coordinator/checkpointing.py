"""Checkpoints while they are being written: the coordinator's files, one from each head, then the manifest.

`CheckpointManager` alone decides, and remembers, which head is asked for its part, and how. A head that trains is asked in the
next reply to it, so that it takes its snapshot before it adopts the new version. That reply may be lost, and a head that has
ended gets no more replies: the driver carries requests to these, and the checkpoint is completed without heads that it can't
reach. So a request may arrive twice; a head acts on it once.
"""

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
"""Seconds after which the driver asks heads that still owe their parts: a reply that asked them may have been lost."""

MAX_OPEN = 3
"""Checkpoints that may be open at once; with that many, storage is too slow, and no other is begun."""


@dataclass
class _OpenCheckpoint:
    """A checkpoint that isn't complete.

    Attributes:
        facts: for the manifest.
        request: what heads are asked for.
        missing: heads whose part isn't here.
        asked_in_reply: heads that were asked in a reply, which may have been lost.
        asked_by_driver: heads that the driver asks, which knows whether its request reached them.
        policy: what the merge policy keeps.
        files, heads: what is written, and the heads whose parts are.
        base_written: whether the coordinator's own files are written.
        begun: in monotonic seconds.
    """

    facts: dict[str, Any]
    request: CheckpointRequest
    missing: set[int]
    policy: dict[str, Tensor]
    asked_in_reply: set[int] = field(default_factory=set)
    asked_by_driver: set[int] = field(default_factory=set)
    files: list[checkpoint.FileEntry] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    base_written: bool = False
    begun: float = field(default_factory=time.monotonic)


class CheckpointManager:
    """Collects the parts of checkpoints and commits each when it is complete. Lives on one event loop.

    A checkpoint is completed without the part of a head whose process is gone or that has moved on: such a head would resume
    from what the base holds of it. Storage that fails, for a head or for the coordinator, costs a checkpoint and not the run:
    `problem` says so, and older checkpoints stay.

    Args:
        context: as for every actor.
        plan: of the base.
        newest: the newest complete version.
        heads_saved: the heads whose states it holds.
    """

    def __init__(self, context: RunContext, plan: Plan, newest: int | None, heads_saved: Collection[int]) -> None:
        self._context, self._plan = context, plan
        self._open: dict[int, _OpenCheckpoint] = {}
        self.newest, self.heads_saved = newest, frozenset(heads_saved)
        self._abandoned: set[int] = set()  # versions whose files still take room
        self.problem = ""
        """Why the last one couldn't be written; empty if it could."""
        self.last_good_version: int | None = None
        """The last version before the loss rose. A run goes back there after a spike, so a checkpoint from before it stays."""

    def begin_checkpoint(
        self, record: MergeRecord, request: CheckpointRequest, facts: Mapping[str, Any], policy: Mapping[str, Tensor]
    ) -> None:
        """Begins a checkpoint of the merge's version, to which each head of the request writes a part.

        Args:
            record: the merge.
            request: for the heads.
            facts: what the manifest says of the coordinator, for JSON.
            policy: what the merge policy keeps; copied.
        """
        settings = self._context.settings
        all_facts = {
            "run": settings.run,
            "step": record.step,
            "taken": record.steps_taken,
            "lte": dataclasses.asdict(settings.lte),
            "untrained": settings.untrained,
            "baseline": settings.train.baseline,
            "never_merge": settings.merge.never_merge,
            "config": self._context.run_toml,
            "losses": {str(head): loss for head, loss in record.losses.items()},
            **json.loads(json.dumps(facts)),
        }
        tensors = {name: tensor.clone() for name, tensor in policy.items()}
        self._open[request.version] = _OpenCheckpoint(all_facts, request, set(request.sequences), tensors)

    def __contains__(self, version: object) -> bool:
        return version in self._open

    @property
    def unfinished(self) -> list[int]:
        """Versions of the checkpoints that aren't complete."""
        return sorted(self._open)

    @property
    def full(self) -> bool:
        """Whether no other one should be begun now."""
        return len(self._open) >= MAX_OPEN

    def requests_in_reply(self, heads: Collection[int]) -> tuple[CheckpointRequest, ...]:
        """Returns what these heads are to write that they weren't asked for yet, for a reply to them."""
        requests = []
        for version in self.unfinished:
            each = self._open[version]
            asked = each.missing.intersection(heads) - each.asked_in_reply - each.asked_by_driver
            each.asked_in_reply |= asked
            requests += _narrowed(each.request, asked)
        return tuple(requests)

    def requests_by_driver(self, heads: Collection[int], late: Collection[int] = ()) -> tuple[CheckpointRequest, ...]:
        """Returns what heads are to write that the driver must ask, once each.

        May be called in another thread than the event loop's. `last_requests` writes `asked_by_driver` too, on the event loop.
        That is safe: both threads only add to this set, and set operations are atomic under the GIL.

        A request that is lost with a status answer isn't repeated here. `last_requests` repeats it when the run freezes.

        Args:
            heads: heads that get no more replies.
            late: heads that do, but that are asked if their part has been missing for `REQUEST_AGAIN` seconds.
        """
        requests, now = [], time.monotonic()
        for each in list(self._open.values()):
            candidates = {*heads, *late} if now - each.begun > REQUEST_AGAIN else set(heads)
            asked = (each.missing & candidates) - each.asked_by_driver
            each.asked_by_driver |= asked
            requests += _narrowed(each.request, asked)
        return tuple(requests)

    def last_requests(self, heads: Collection[int]) -> tuple[CheckpointRequest, ...]:
        """Returns all that these heads still owe, for the driver: from now on no reply asks them."""
        requests = []
        for version in self.unfinished:
            each = self._open[version]
            asked = each.missing.intersection(heads)
            each.asked_by_driver |= asked
            requests += _narrowed(each.request, asked)
        return tuple(requests)

    async def write_base(self, version: int, published: Published) -> None:
        """Writes the coordinator's part: all that `published` has, and the policy's state."""
        opened, directory = self._open.get(version), self._context.directory
        if opened is None:
            return
        try:
            await self._remove_abandoned()
            fetch = self._context.transport.fetch_async
            base = await fetch(published.parts[-1])
            references = {head: await fetch(handle) for head, handle in published.references.items()}
            opened.files.append(await asyncio.to_thread(checkpoint.write_base, directory, version, self._plan, base))
            inject("base written", version=version)
            if references:
                opened.files.append(await asyncio.to_thread(checkpoint.write_references, directory, version, references))
            if published.momentum:
                name, momentum = self._context.settings.merge.policy, await fetch(published.momentum[-1])
                entry = await asyncio.to_thread(checkpoint.write_momentum, directory, version, self._plan, name, momentum)
                opened.files.append(entry)
            if published.residual:
                residual = await fetch(published.residual[-1])
                entry = await asyncio.to_thread(checkpoint.write_residual, directory, version, self._plan, residual)
                opened.files.append(entry)
            if published.ema:
                ema = await fetch(published.ema[-1])
                opened.files.append(await asyncio.to_thread(checkpoint.write_ema, directory, version, self._plan, ema))
            if opened.policy:
                name = self._context.settings.merge.policy
                opened.files.append(await asyncio.to_thread(checkpoint.write_policy, directory, version, name, opened.policy))
        except StorageError as error:
            self._abandon(version, error)
            return
        opened.base_written = True
        await self._commit_if_complete(version)

    async def add_part(self, version: int, head: int, entry: checkpoint.FileEntry | None, why: str = "") -> None:
        """A head has written its file, or has none to write (`entry` is None), or can't write it, because of `why`."""
        opened = self._open.get(version)
        if opened is None or head not in opened.missing:
            return
        if why:
            self._abandon(version, why)
            return
        opened.missing.discard(head)
        if entry is not None:
            opened.files.append(entry)
            opened.heads.append(head)
        await self._commit_if_complete(version)

    async def drop_head(self, head: int) -> None:
        """A head's process is gone."""
        for version in self.unfinished:
            await self.add_part(version, head, None)

    async def _commit_if_complete(self, version: int) -> None:
        opened, directory = self._open.get(version), self._context.directory
        if opened is None or opened.missing or not opened.base_written:
            return
        try:
            inject("commits", version=version)
            await asyncio.to_thread(checkpoint.commit, directory, version, opened.heads, opened.files, opened.facts)
            inject("committed", version=version)
        except StorageError as error:
            self._abandon(version, error)
            return
        if self.newest is None or version > self.newest:
            self.newest, self.heads_saved = version, frozenset(opened.heads)
        self.problem = ""
        self._open.pop(version, None)
        for older in [v for v in self._open if v < version and self._open[v].missing]:
            self._open.pop(older)  # the request for a part was lost, and a newer checkpoint is complete
            self._abandoned.add(older)
        keep = self._context.retention
        await asyncio.to_thread(checkpoint.prune, directory, keep.last, keep.best, keep.best_by, self.last_good_version)

    async def _remove_abandoned(self) -> None:
        """Removes the files of abandoned checkpoints. Not at once: heads may still write to them."""
        directory, versions = self._context.directory, self._abandoned - self._open.keys()
        self._abandoned -= versions
        if versions:
            await asyncio.to_thread(checkpoint.remove_incomplete, directory, versions)

    def _abandon(self, version: int, error: StorageError | str) -> None:
        self._open.pop(version, None)
        self._abandoned.add(version)
        self.problem = f"checkpoint {version} couldn't be written: {error}"

    def abandon_all(self) -> None:
        """The run has failed: none of the open checkpoints will be complete."""
        self._open.clear()

    async def wait_until_complete(self, limit: float) -> bool:
        """Waits up to `limit` seconds. Returns whether all are complete."""
        end = time.monotonic() + limit
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return not self._open


def _narrowed(request: CheckpointRequest, heads: Collection[int]) -> list[CheckpointRequest]:
    """Returns the request for these heads only; an empty list if there are none."""
    sequences = {head: request.sequences[head] for head in sorted(heads)}
    return [dataclasses.replace(request, sequences=sequences)] if sequences else []
