"""The main weights spread over shard processes: the coordinator's side, which moves numbers and handles only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lte_ray.engine.elsewhere import Measured
from lte_ray.errors import CoordinatorLost
from lte_ray.layout import Layout
from lte_ray.merging.transfer import Codec
from lte_ray.runtime.publisher import Published
from lte_ray.runtime.told import DEAD
from lte_ray.runtime.transport import Handle, Pieces


@dataclass
class _Shard:
    """One shard's actor, the numbers of its groups, and the calls sent to it that take a turn."""

    actor: Any
    number: int
    groups: tuple[int, ...]
    turn: int = field(default=0)

    def next_turn(self) -> int:
        self.turn += 1
        return self.turn - 1


class Shards:
    """`Masters` of shard actors.

    Args:
        actors: `ShardActor`s, by their number.
        codecs: each head's.
        version: the newest.
    """

    def __init__(self, actors: Sequence[Any], codecs: Sequence[Codec], version: int) -> None:
        groups = codecs[0].groups
        self._codecs, self._version = codecs, version
        self._shards = [
            _Shard(actor, number, tuple(i for i, group in enumerate(groups) if group.shard == number))
            for number, actor in enumerate(actors)
        ]

    async def receive(self, ticket: int, head: int, handles: Sequence[Handle], seals: Sequence[int]) -> Measured:
        count = len(self._codecs[head].groups)
        if len(handles) != count:
            raise ValueError(f"expected the buffers of groups 0 to {count - 1}, found {list(range(len(handles)))}")
        found = await self._all(
            (shard, shard.actor.receive.remote(shard.turn, ticket, head, {i: (handles[i], seals[i]) for i in shard.groups}))
            for shard in self._shards
        )
        reasons = [reason for reason in found if isinstance(reason, str)]
        if reasons:
            self.forget(ticket)
            raise ValueError(reasons[0])
        return Measured(sum(found))

    def forget(self, ticket: int) -> None:
        for shard in self._shards:
            shard.actor.forget.remote(ticket)

    def renew(self, head: int) -> None:
        for shard in self._shards:
            shard.actor.renew.remote(shard.next_turn(), head)

    def merged(self, version: int, weights: Mapping[int, float]) -> Coroutine[Any, Any, float]:
        self._version = version
        return self._slowest([(shard, shard.actor.merge.remote(shard.next_turn(), version, weights)) for shard in self._shards])

    def parts(self, groups: Sequence[int], references: bool) -> Coroutine[Any, Any, Published]:
        asked = []
        for shard in self._shards:
            mine = tuple(i for i in shard.groups if i in groups)
            if mine:
                asked.append((shard, shard.actor.publish.remote(shard.next_turn(), mine, references)))
        return self._published(self._version, asked)

    def whole(self, references: bool = False) -> Coroutine[Any, Any, Published]:
        return self._assembled(self.parts(range(len(self._codecs[0].groups)), references))

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._sum([(shard, shard.actor.checksum.remote(shard.next_turn())) for shard in self._shards])

    async def _slowest(self, asked: Sequence[tuple[_Shard, Any]]) -> float:
        return float(max(await self._all(asked)))

    async def _sum(self, asked: Sequence[tuple[_Shard, Any]]) -> int:
        return int(sum(await self._all(asked)) % 2**64)

    async def _published(self, version: int, asked: Sequence[tuple[_Shard, Any]]) -> Published:
        parts: dict[int, Handle] = {}
        held: dict[int, list[tuple[int, Handle]]] = {}  # by head: the groups, and its factors there
        for shard_parts, shard_held in await self._all(asked):
            parts.update(shard_parts)
            for index, factors in shard_held.items():
                for head, handle in factors.items():
                    held.setdefault(head, []).append((index, handle))
        references = {head: self._factors(head, pieces) for head, pieces in held.items()}
        return Published(version, parts, references)

    async def _assembled(self, publishing: Awaitable[Published]) -> Published:
        published, codec = await publishing, self._codecs[0]
        parts = sorted(published.parts.items())
        pieces = [(handle, _places(codec.plan.base, codec.parts[index].base)) for index, handle in parts]
        return replace(published, parts={-1: Pieces(codec.plan.base.size, tuple(pieces))})

    def _factors(self, head: int, pieces: Sequence[tuple[int, Handle]]) -> Pieces:
        codec = self._codecs[head]
        whole = codec.plan.contribution
        placed = []
        for index, handle in sorted(pieces, key=lambda piece: piece[0]):
            own = codec.parts[index]
            factors = Layout(own.contribution.entries[: 2 * len(own.adapted)])
            placed.append((handle, _places(whole, factors)))
        return Pieces(codec.plan.factors_size, tuple(placed))

    async def _all(self, asked: Iterable[tuple[_Shard, Any]]) -> list[Any]:
        """The answers; all were asked before the first is waited for.

        Raises:
            CoordinatorLost: a shard's process died.
        """
        return await asyncio.gather(*[_answer(shard.number, reference) for shard, reference in asked])


async def _answer(number: int, reference: Any) -> Any:
    try:
        return await reference
    except DEAD as error:
        raise CoordinatorLost(f"The process of coordinator shard {number} died: {error}") from error


def _places(whole: Layout, own: Layout) -> tuple[tuple[int, int], ...]:
    """Where a layout's entries lie in a larger one."""
    begins = {entry.name: entry.offset for entry in whole.entries}
    return tuple((begins[entry.name], begins[entry.name] + entry.size) for entry in own.entries)
