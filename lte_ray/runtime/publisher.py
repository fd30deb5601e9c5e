"""Where the main weights are, as the coordinator's process sees it; and their parts for heads, published once a version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.elsewhere import Measured
from lte_ray.messages import Standing
from lte_ray.runtime.transport import Handle


@dataclass(frozen=True)
class Published:
    """Parts of one version's base, by group (-1: the whole), and the references that it holds, by head.

    `held` is what it holds of each head, and `ledger` whose which batches are at that version.
    """

    version: int
    parts: dict[int, Handle] = field(default_factory=dict)
    references: dict[int, Handle] = field(default_factory=dict)
    held: dict[int, Standing] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)


class Masters(Protocol):
    """The tensors of merging, in this process (`OwnMaster`) or in shards (`Shards`).

    What a method gives is of the version that is the newest when it is called, whatever is merged until the result comes. All
    are called on one event loop.
    """

    def receive(self, ticket: int, head: int, handles: Sequence[Handle], seals: Sequence[int]) -> Awaitable[Tensor | Measured]:
        """Fetches and decodes a contribution: for `engine.Coordinator.receive`.

        Raises:
            ValueError: it can't be decoded, or didn't arrive as it was sent.
            Gone: it can't be fetched any more.
        """
        ...

    def forget(self, ticket: int) -> None:
        """The contribution won't be merged."""
        ...

    def renew(self, head: int) -> None:
        """A head begins with B = 0, or has left: nothing that is held of this number is anybody's reference from here on."""
        ...

    def merged(self, version: int, weights: Mapping[int, float]) -> Awaitable[float]:
        """The engine has decided the next version, of these tickets by weight (none where the policy made the change itself).

        Gives the seconds that its products took, once they are computed.
        """
        ...

    def parts(self, groups: Sequence[int], references: bool) -> Awaitable[Published]:
        """Publishes these groups' parts, and all references if they are wanted."""
        ...

    def whole(self, references: bool = False) -> Awaitable[Published]:
        """Publishes the whole base, flat, and all references if they are wanted."""
        ...

    def checksum(self) -> Awaitable[int]:
        """Of the groups that heads redo from factors, together."""
        ...


def known(engine: Coordinator) -> Published:
    """What the newest version holds, without its base."""
    return Published(engine.version, held=dict(engine.standings), ledger=engine.data.state())


class Publisher:
    """Publishes what heads ask for, each version at most once.

    Args:
        masters: what is published.
        engine: knows the newest version.
    """

    def __init__(self, masters: Masters, engine: Coordinator) -> None:
        self._masters, self._engine = masters, engine
        self._last: dict[tuple[int, ...], Published] = {}
        self._turn = asyncio.Lock()

    async def newest(self, groups: Sequence[int], references: bool) -> Published:
        """These groups' parts of the newest version, and all references if they are wanted."""
        key = (*groups, -1) if references else tuple(groups)
        if not key:
            return known(self._engine)
        async with self._turn:  # whoever comes meanwhile gets what is published now, or waits for what comes next
            last = self._last.get(key)
            if last is None or last.version < self._engine.version:
                there, parts = known(self._engine), self._masters.parts(groups, references)  # of the same version
                last = replace(await parts, held=there.held, ledger=there.ledger)
                self._last[key] = last
        return last
