"""The main weights in the coordinator's own process: products are computed in a thread beside the event loop.

The main weights spread over shard processes: the coordinator's side, which moves numbers and handles only.

Where the main weights are, as the coordinator's process sees it; and their parts for heads, published once a version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lte_ray.engine.coordinator.aggregator import MeasuredContribution
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.errors import CoordinatorLost
from lte_ray.layout import Layout
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import CommittedPosition
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import AssembledRef, Handle
from lte_ray.runtime.ray_errors import PROCESS_DIED
from lte_ray.transfer.checksum import base_checksum, verify_checksums
from lte_ray.transfer.codec import Codec


@dataclass(frozen=True)
class Published:
    """Parts of one version's base, by group (-1: the whole), and the references that it holds, by head.

    `held` is what it holds of each head, and `ledger` whose which batches are at that version.
    """

    version: int
    parts: dict[int, Handle] = field(default_factory=dict)
    references: dict[int, Handle] = field(default_factory=dict)
    positions: dict[int, CommittedPosition] = field(default_factory=dict)
    assignment_state: dict[str, Any] = field(default_factory=dict)


class Aggregator(Protocol):
    """The tensors of merging, in this process (`LocalAggregator`) or in shards (`ShardedAggregator`).

    What a method gives is of the version that is the newest when it is called, whatever is merged until the result comes. All
    are called on one event loop.
    """

    def receive(
        self, ticket: int, head: int, handles: Sequence[Handle], checksums: Sequence[int]
    ) -> Awaitable[Tensor | MeasuredContribution]:
        """Fetches and decodes a contribution: for `engine.Coordinator.receive`.

        Raises:
            ValueError: it can't be decoded, or didn't arrive as it was sent.
            ObjectLost: it can't be fetched any more.
        """
        ...

    def discard(self, ticket: int) -> None:
        """The contribution won't be merged."""
        ...

    def forget_head(self, head: int) -> None:
        """A head begins with B = 0, or has left: nothing that is held of this number is anybody's reference from here on."""
        ...

    def merge(self, version: int, weights: Mapping[int, float]) -> Awaitable[float]:
        """The engine has decided the next version, of these tickets by weight (none where the policy made the change itself).

        Gives the seconds that its products took, once they are computed.
        """
        ...

    def publish_parts(self, groups: Sequence[int], references: bool) -> Awaitable[Published]:
        """Publishes these groups' parts, and all references if they are wanted."""
        ...

    def publish_base(self, references: bool = False) -> Awaitable[Published]:
        """Publishes the whole base, flat, and all references if they are wanted."""
        ...

    def checksum(self) -> Awaitable[int]:
        """Of the groups that heads redo from factors, together."""
        ...


def known(engine: Coordinator) -> Published:
    """What the newest version holds, without its base."""
    return Published(engine.version, positions=dict(engine.positions), assignment_state=engine.assignor.state())


class Publisher:
    """Publishes what heads ask for, each version at most once.

    Args:
        masters: what is published.
        engine: knows the newest version.
    """

    def __init__(self, masters: Aggregator, engine: Coordinator) -> None:
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
                there, parts = known(self._engine), self._masters.publish_parts(groups, references)  # of the same version
                last = replace(await parts, positions=there.positions, assignment_state=there.assignment_state)
                self._last[key] = last
        return last


T = TypeVar("T")


class LocalAggregator:
    """`Aggregator` of an `engine.Coordinator` that holds the base itself.

    Args:
        common: as every actor.
        engine: the coordinator.
        codecs: each head's.
        threads: that torch computes with.
    """

    def __init__(self, common: RunContext, engine: Coordinator, codecs: Sequence[Codec], threads: int) -> None:
        self._transport, self._engine, self._codecs, self._threads = common.transport, engine, codecs, threads
        self._beside = ThreadPoolExecutor(1, "merge")

    async def receive(self, ticket: int, head: int, handles: Sequence[Handle], checksums: Sequence[int]) -> Tensor:
        buffers = [await self._transport.fetch_async(handle) for handle in handles]
        verify_checksums(buffers, checksums)
        # Nobody changes the reference meanwhile: it is this head's, which has nothing else outstanding.
        return self._codecs[head].decode(dict(enumerate(buffers)), self._engine.reference(head))

    def discard(self, ticket: int) -> None:
        """The engine keeps what isn't decided."""

    def forget_head(self, head: int) -> None:
        """The engine has forgotten what it held of it."""

    async def merge(self, version: int, weights: Mapping[int, float]) -> float:
        await self._caught_up()
        return self._engine.base_weights.pop_seconds(version)

    def publish_parts(self, groups: Sequence[int], references: bool) -> Coroutine[Any, Any, Published]:
        def publish(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> Published:
            return Published(
                version,
                {index: self._transport.publish(self._part(index, base)) for index in groups},
                {h: self._transport.publish(factors) for h, factors in held.items() if references and factors is not None},
            )

        return self._after(self._engine.base_weights.schedule_read(publish))

    def publish_base(self, references: bool = False) -> Coroutine[Any, Any, Published]:
        def publish(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> Published:
            known = {h: f for h, f in held.items() if f is not None} if references else {}
            return Published(
                version, {-1: self._transport.publish(base)}, {h: self._transport.publish(f) for h, f in known.items()}
            )

        return self._after(self._engine.base_weights.schedule_read(publish))

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._after(self._engine.base_weights.schedule_read(lambda version, base, held: self._sum(base)))

    async def _after(self, result: Future[T]) -> T:
        await self._caught_up()
        return result.result()

    async def _caught_up(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._beside, self._catch_up)

    def _catch_up(self) -> None:
        with torch_threads(self._threads):
            self._engine.base_weights.catch_up()

    def _part(self, index: int, base: Tensor) -> Tensor:
        codec = self._codecs[0]
        return (
            base
            if len(codec.group_plans) == 1
            else gather(codec.group_plans[index].base, views(codec.plan.base, base), base.dtype)
        )

    def _sum(self, base: Tensor) -> int:
        entries = views(self._engine.plan.base, base)
        names = [name for group in self._codecs[0].groups if group.by_factors for name in group.names]
        return sum(base_checksum(entries[name]) for name in names) % 2**64


@dataclass
class _ShardStub:
    """One shard's actor, the numbers of its groups, and the calls sent to it that take a turn."""

    actor: Any
    number: int
    groups: tuple[int, ...]
    turn: int = field(default=0)

    def next_turn(self) -> int:
        self.turn += 1
        return self.turn - 1


class ShardedAggregator:
    """`Aggregator` of shard actors.

    Args:
        actors: `ShardActor`s, by their number.
        codecs: each head's.
        version: the newest.
    """

    def __init__(self, actors: Sequence[Any], codecs: Sequence[Codec], version: int) -> None:
        groups = codecs[0].groups
        self._codecs, self._version = codecs, version
        self._shards = [
            _ShardStub(actor, number, tuple(i for i, group in enumerate(groups) if group.shard == number))
            for number, actor in enumerate(actors)
        ]

    async def receive(
        self, ticket: int, head: int, handles: Sequence[Handle], checksums: Sequence[int]
    ) -> MeasuredContribution:
        count = len(self._codecs[head].groups)
        if len(handles) != count:
            raise ValueError(f"expected the buffers of groups 0 to {count - 1}, found {list(range(len(handles)))}")
        found = await self._all(
            (shard, shard.actor.receive.remote(shard.turn, ticket, head, {i: (handles[i], checksums[i]) for i in shard.groups}))
            for shard in self._shards
        )
        reasons = [reason for reason in found if isinstance(reason, str)]
        if reasons:
            self.discard(ticket)
            raise ValueError(reasons[0])
        return MeasuredContribution(sum(found))

    def discard(self, ticket: int) -> None:
        for shard in self._shards:
            shard.actor.discard.remote(ticket)

    def forget_head(self, head: int) -> None:
        for shard in self._shards:
            shard.actor.forget_head.remote(shard.next_turn(), head)

    def merge(self, version: int, weights: Mapping[int, float]) -> Coroutine[Any, Any, float]:
        self._version = version
        return self._slowest([(shard, shard.actor.merge.remote(shard.next_turn(), version, weights)) for shard in self._shards])

    def publish_parts(self, groups: Sequence[int], references: bool) -> Coroutine[Any, Any, Published]:
        asked = []
        for shard in self._shards:
            mine = tuple(i for i in shard.groups if i in groups)
            if mine:
                asked.append((shard, shard.actor.publish.remote(shard.next_turn(), mine, references)))
        return self._published(self._version, asked)

    def publish_base(self, references: bool = False) -> Coroutine[Any, Any, Published]:
        return self._assembled(self.publish_parts(range(len(self._codecs[0].groups)), references))

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._sum([(shard, shard.actor.checksum.remote(shard.next_turn())) for shard in self._shards])

    async def _slowest(self, asked: Sequence[tuple[_ShardStub, Any]]) -> float:
        return float(max(await self._all(asked)))

    async def _sum(self, asked: Sequence[tuple[_ShardStub, Any]]) -> int:
        return int(sum(await self._all(asked)) % 2**64)

    async def _published(self, version: int, asked: Sequence[tuple[_ShardStub, Any]]) -> Published:
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
        pieces = [(handle, _places(codec.plan.base, codec.group_plans[index].base)) for index, handle in parts]
        return replace(published, parts={-1: AssembledRef(codec.plan.base.size, tuple(pieces))})

    def _factors(self, head: int, pieces: Sequence[tuple[int, Handle]]) -> AssembledRef:
        codec = self._codecs[head]
        whole = codec.plan.contribution
        placed = []
        for index, handle in sorted(pieces, key=lambda piece: piece[0]):
            own = codec.group_plans[index]
            factors = Layout(own.contribution.entries[: 2 * len(own.adapted)])
            placed.append((handle, _places(whole, factors)))
        return AssembledRef(codec.plan.factors_size, tuple(placed))

    async def _all(self, asked: Iterable[tuple[_ShardStub, Any]]) -> list[Any]:
        """The answers; all were asked before the first is waited for.

        Raises:
            CoordinatorLost: a shard's process died.
        """
        return await asyncio.gather(*[_answer(shard.number, reference) for shard, reference in asked])


async def _answer(number: int, reference: Any) -> Any:
    try:
        return await reference
    except PROCESS_DIED as error:
        raise CoordinatorLost(f"The process of coordinator shard {number} died: {error}") from error


def _places(whole: Layout, own: Layout) -> tuple[tuple[int, int], ...]:
    """Where a layout's entries lie in a larger one."""
    begins = {entry.name: entry.offset for entry in whole.entries}
    return tuple((begins[entry.name], begins[entry.name] + entry.size) for entry in own.entries)
