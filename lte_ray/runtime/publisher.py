"""Where the main weights are, as the coordinator's process sees it; and their parts for heads, published once a version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lte_ray.engine.elsewhere import Measured
from lte_ray.runtime.transport import Handle


@dataclass(frozen=True)
class Published:
    """Parts of one version's base, by group, and the references that it holds, by head."""

    version: int
    parts: dict[int, Handle] = field(default_factory=dict)
    references: dict[int, Handle] = field(default_factory=dict)


class Masters(Protocol):
    """The tensors of merging, in this process (`OwnMaster`) or in shards (`Shards`).

    What a method gives is of the version that is the newest when it is called, whatever is merged until the result comes. All
    are called on one event loop.
    """

    def receive(self, ticket: int, head: int, handles: Sequence[Handle]) -> Awaitable[Tensor | Measured]:
        """Fetches and decodes a contribution: for `engine.Coordinator.receive`.

        Raises:
            ValueError: it can't be decoded.
        """
        ...

    def forget(self, ticket: int) -> None:
        """The contribution won't be merged."""
        ...

    def merged(self, version: int, weights: Mapping[int, float]) -> Awaitable[float]:
        """The engine has decided the next version, of these tickets by weight (none where the policy made the change itself).

        Gives the seconds that its products took, once they are computed.
        """
        ...

    def parts(self, groups: Sequence[int], references: bool) -> Awaitable[Published]:
        """Publishes these groups' parts, and all references if they are wanted."""
        ...

    def whole(self) -> Awaitable[Handle]:
        """Publishes the whole base, flat."""
        ...

    def checksum(self) -> Awaitable[int]:
        """Of the groups that heads redo from factors, together."""
        ...


class Publisher:
    """Publishes what heads ask for, each version at most once.

    Args:
        masters: what is published.
        version: gives the newest.
    """

    def __init__(self, masters: Masters, version: Callable[[], int]) -> None:
        self._masters, self._version = masters, version
        self._last: dict[tuple[int, ...], Published] = {}
        self._turn = asyncio.Lock()

    async def newest(self, groups: Sequence[int], references: bool) -> Published:
        """These groups' parts of the newest version, and all references if they are wanted."""
        key = (*groups, -1) if references else tuple(groups)
        if not key:
            return Published(self._version())
        async with self._turn:  # whoever comes meanwhile gets what is published now, or waits for what comes next
            last = self._last.get(key)
            if last is None or last.version < self._version():
                last = await self._masters.parts(groups, references)
                self._last[key] = last
        return last
