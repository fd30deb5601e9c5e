"""Publishes the newest base, or the parts of it that heads need, once a version."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lte_ray.engine.master import Master
from lte_ray.engine.threads import torch_threads
from lte_ray.merging.flat import gather, views
from lte_ray.merging.transfer import Codec
from lte_ray.runtime.transport import Handle, Transport


@dataclass(frozen=True)
class Published:
    """Parts of one version's base, by group, and the references that it holds, by head."""

    version: int
    parts: dict[int, Handle] = field(default_factory=dict)
    references: dict[int, Handle] = field(default_factory=dict)


class Publisher:
    """Copies out of the master in a thread beside the event loop, where the merges are computed, too.

    Args:
        transport: where to.
        codec: any head's: the parts of a base are the same for all.
        master: what is published.
        beside: the thread.
        threads: that torch uses in it.
    """

    def __init__(self, transport: Transport, codec: Codec, master: Master, beside: Executor, threads: int) -> None:
        self._transport, self._codec, self._master = transport, codec, master
        self._beside, self._threads = beside, threads
        self._last: dict[tuple[int, ...], Published] = {}
        self._turn = asyncio.Lock()

    async def newest(self, groups: Sequence[int], references: bool) -> Published:
        """These groups' parts of the newest version, and all references if they are wanted."""
        key = (*groups, -1) if references else tuple(groups)
        if not key:
            return Published(self._master.version)
        async with self._turn:  # whoever comes meanwhile gets what is published now, or waits for what comes next
            last = self._last.get(key)
            if last is None or last.version < self._master.version:
                last = await asyncio.get_running_loop().run_in_executor(self._beside, self._copy_out, groups, references)
                self._last[key] = last
        return last

    def whole(self, base: Tensor) -> Handle:
        """A whole base, flat."""
        return self._transport.publish(base)

    def _copy_out(self, groups: Sequence[int], references: bool) -> Published:
        def use(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> Published:
            there: dict[int, Any] = {head: factors for head, factors in held.items() if factors is not None}
            return Published(
                version,
                {index: self._transport.publish(self._part(index, base)) for index in groups},
                {head: self._transport.publish(factors) for head, factors in there.items()} if references else {},
            )

        with torch_threads(self._threads):
            return self._master.read(use)

    def _part(self, index: int, base: Tensor) -> Tensor:
        if len(self._codec.parts) == 1:
            return base
        return gather(self._codec.parts[index].base, views(self._codec.plan.base, base), base.dtype)
