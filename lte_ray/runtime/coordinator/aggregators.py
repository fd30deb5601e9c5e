"""Where the tensors of merging are: in the coordinator's own process (`LocalAggregator`), or in shards (`ShardedAggregator`).

A local aggregator computes products in a thread of its own, apart from the event loop. A sharded one moves numbers and handles
only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lte_ray.engine.coordinator.aggregator import MeasuredContribution
from lte_ray.engine.coordinator.base_weights import BaseVersion, TensorName
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.engine.spans import span
from lte_ray.errors import CoordinatorLost
from lte_ray.layout import Layout
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import CommittedPosition, OuterStep
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import AssembledRef, Handle
from lte_ray.runtime.ray_errors import PROCESS_DIED
from lte_ray.transfer.checksum import base_checksum, verify_checksums
from lte_ray.transfer.codec import Codec

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """One version, or parts of it.

    Attributes:
        version: its number.
        parts: of its base, by group; -1: the whole base.
        references: those that it holds, by head.
        momentum: parts of its momentum, as `parts`; empty where there is none.
        residual: parts of what rounded changes have left out so far, as `parts`; empty where there is none.
        positions: what the version holds of each head.
        assignment_state: which head owns which batches at it.
        ema: parts of the moving average of the bases up to it, as `parts`; empty where there is none.
    """

    version: int
    parts: dict[int, Handle] = field(default_factory=dict)
    references: dict[int, Handle] = field(default_factory=dict)
    momentum: dict[int, Handle] = field(default_factory=dict)
    residual: dict[int, Handle] = field(default_factory=dict)
    positions: dict[int, CommittedPosition] = field(default_factory=dict)
    assignment_state: dict[str, Any] = field(default_factory=dict)
    ema: dict[int, Handle] = field(default_factory=dict)


class Aggregator(Protocol):
    """The tensors of merging. All methods are called on one event loop.

    A result is of the version that is the newest when the method is called, whatever is merged before the result is ready.
    """

    def receive(
        self, ticket: int, head: int, handles: Sequence[Handle], checksums: Sequence[int]
    ) -> Awaitable[Tensor | MeasuredContribution]:
        """Fetches and decodes a contribution for `engine.Coordinator.receive`.

        Raises:
            ValueError: it can't be decoded, or was changed on its way.
            ObjectLost: it can no longer be fetched.
        """
        ...

    def discard(self, ticket: int) -> None:
        """The contribution won't be merged."""
        ...

    def forget_head(self, head: int) -> None:
        """A head begins with B = 0, or has left: factors of this number are no head's reference from here on."""
        ...

    def merge(
        self, version: int, weights: Mapping[int, float], step: OuterStep | None, ema_keep: float | None
    ) -> Awaitable[float]:
        """Computes the next version, which the engine has decided.

        Args:
            version: the next one.
            weights: by ticket; empty where the policy made the change itself.
            step: what is done with the sum of the changes.
            ema_keep: the share of the moving average that stays; None if there is none.

        Returns:
            The seconds that the products took, once they are computed.
        """
        ...

    def publish_parts(self, groups: Sequence[int], references: bool, momentum: Collection[int] = ()) -> Awaitable[Published]:
        """Publishes these groups' parts of the base, all references if wanted, and the momentum of those in `momentum`."""
        ...

    def publish_base(self, complete: bool = False) -> Awaitable[Published]:
        """Publishes the whole base and its moving average, flat; if `complete`, momentum, residual and all references, too."""
        ...

    def publish_changes(self) -> Awaitable[dict[int, Handle]]:
        """Publishes the rounded changes that led to this version, by group; of the groups that travel so."""
        ...

    def checksum(self) -> Awaitable[int]:
        """The sum of the checksums, of base and momentum, of the groups that heads redo."""
        ...


class LocalAggregator:
    """`Aggregator` of an engine that holds the base itself.

    Args:
        context: as for every actor.
        engine: the coordinator.
    """

    def __init__(self, context: RunContext, engine: Coordinator) -> None:
        self._transport, self._engine, self._weights = context.transport, engine, engine.base_weights
        self._codecs = context.codecs(engine.plans)
        self._threads = context.merge_threads(engine.plan, engine.plan)
        self._executor = ThreadPoolExecutor(1, "merge")

    async def receive(self, ticket: int, head: int, handles: Sequence[Handle], checksums: Sequence[int]) -> Tensor:
        buffers = [await self._transport.fetch_async(handle) for handle in handles]
        with span("verify checksums"):
            verify_checksums(buffers, checksums)
        with span("decode"):  # the reference doesn't change meanwhile: this head has nothing else outstanding
            return self._codecs[head].decode(dict(enumerate(buffers)), self._engine.reference(head))

    def discard(self, ticket: int) -> None:
        """The engine keeps the undecided contributions itself."""

    def forget_head(self, head: int) -> None:
        """The engine has forgotten its factors itself."""

    async def merge(self, version: int, weights: Mapping[int, float], step: OuterStep | None, ema_keep: float | None) -> float:
        await self._catch_up()
        return self._weights.pop_seconds(version)

    def publish_parts(
        self, groups: Sequence[int], references: bool, momentum: Collection[int] = ()
    ) -> Coroutine[Any, Any, Published]:
        def publish(newest: BaseVersion) -> Published:
            return Published(
                newest.version,
                {index: self._transport.publish(self._part(index, newest.base)) for index in groups},
                self._publish_references(newest.references) if references else {},
                {i: self._transport.publish(self._part(i, newest.momentum)) for i in momentum if newest.momentum is not None},
            )

        return self._read(self._weights.schedule_read(publish))

    def publish_base(self, complete: bool = False) -> Coroutine[Any, Any, Published]:
        def publish(newest: BaseVersion) -> Published:
            flats = (newest.base, newest.ema, *((newest.momentum, newest.residual) if complete else (None, None)))
            base, ema, momentum, residual = ({} if flat is None else {-1: self._transport.publish(flat)} for flat in flats)
            references = self._publish_references(newest.references) if complete else {}
            return Published(newest.version, base, references, momentum, residual, ema=ema)

        return self._read(self._weights.schedule_read(publish))

    def publish_changes(self) -> Coroutine[Any, Any, dict[int, Handle]]:
        def publish(newest: BaseVersion) -> dict[int, Handle]:
            return {} if newest.change is None else {0: self._transport.publish(newest.change)}

        return self._read(self._weights.schedule_read(publish))

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._read(self._weights.schedule_read(self._checksum))

    async def _read(self, result: Future[T]) -> T:
        await self._catch_up()
        return result.result()

    async def _catch_up(self) -> None:
        def catch_up() -> None:
            with torch_threads(self._threads):
                self._weights.catch_up()

        await asyncio.get_running_loop().run_in_executor(self._executor, catch_up)

    def _publish_references(self, factors: Mapping[int, Tensor | None]) -> dict[int, Handle]:
        return {head: self._transport.publish(flat) for head, flat in factors.items() if flat is not None}

    def _part(self, index: int, base: Tensor) -> Tensor:
        codec = self._codecs[0]
        if len(codec.group_plans) == 1:
            return base
        return gather(codec.group_plans[index].base, views(codec.plan.base, base), base.dtype)

    def _checksum(self, newest: BaseVersion) -> int:
        tensors = [newest.base] if newest.momentum is None else [newest.base, newest.momentum]
        entries = [views(self._engine.plan.base, flat) for flat in tensors]
        names = [name for group in self._codecs[0].groups if group.redone for name in group.names]
        return sum(base_checksum(each[name]) for each in entries for name in names) % 2**64


@dataclass
class _ShardStub:
    """One shard's actor, the numbers of its groups, and how many calls that take a turn were sent to it."""

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
        answers = await self._gather(
            (shard, shard.actor.receive.remote(shard.turn, ticket, head, {i: (handles[i], checksums[i]) for i in shard.groups}))
            for shard in self._shards
        )
        reasons = [reason for reason in answers if isinstance(reason, str)]
        if reasons:
            self.discard(ticket)
            raise ValueError(reasons[0])
        return MeasuredContribution(sum(answers))

    def discard(self, ticket: int) -> None:
        for shard in self._shards:
            shard.actor.discard.remote(ticket)

    def forget_head(self, head: int) -> None:
        for shard in self._shards:
            shard.actor.forget_head.remote(shard.next_turn(), head)

    def merge(
        self, version: int, weights: Mapping[int, float], step: OuterStep | None, ema_keep: float | None
    ) -> Coroutine[Any, Any, float]:
        self._version = version
        return self._slowest(
            [(shard, shard.actor.merge.remote(shard.next_turn(), version, weights, step, ema_keep)) for shard in self._shards]
        )

    def publish_parts(
        self, groups: Sequence[int], references: bool, momentum: Collection[int] = ()
    ) -> Coroutine[Any, Any, Published]:
        calls = []
        for shard in self._shards:
            numbers = tuple(i for i in shard.groups if i in groups)
            if numbers:
                of_momentum = tuple(i for i in numbers if i in momentum)
                calls.append((shard, shard.actor.publish.remote(shard.next_turn(), numbers, references, of_momentum)))
        return self._published(self._version, calls)

    def publish_base(self, complete: bool = False) -> Coroutine[Any, Any, Published]:
        groups = range(len(self._codecs[0].groups))
        ema, residual = self._published_each("ema"), self._published_each("residual") if complete else None
        return self._assembled(self.publish_parts(groups, complete, groups if complete else ()), ema, residual)

    def publish_changes(self) -> Coroutine[Any, Any, dict[int, Handle]]:
        return self._published_each("change")

    def _published_each(self, name: TensorName) -> Coroutine[Any, Any, dict[int, Handle]]:
        """One of a version's tensors, which all shards publish: handles by group, of the groups that have it."""
        calls = [(shard, shard.actor.publish_each.remote(shard.next_turn(), name)) for shard in self._shards]

        async def merge() -> dict[int, Handle]:
            return {index: handle for answer in await self._gather(calls) for index, handle in answer.items()}

        return merge()

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._sum([(shard, shard.actor.checksum.remote(shard.next_turn())) for shard in self._shards])

    async def _slowest(self, calls: Sequence[tuple[_ShardStub, Any]]) -> float:
        return float(max(await self._gather(calls)))

    async def _sum(self, calls: Sequence[tuple[_ShardStub, Any]]) -> int:
        return int(sum(await self._gather(calls)) % 2**64)

    async def _published(self, version: int, calls: Sequence[tuple[_ShardStub, Any]]) -> Published:
        parts: dict[int, Handle] = {}
        momentum: dict[int, Handle] = {}
        pieces: dict[int, list[tuple[int, Handle]]] = {}  # by head: the groups, and its factors there
        for shard_parts, shard_references, shard_momentum in await self._gather(calls):
            parts.update(shard_parts)
            momentum.update(shard_momentum)
            for index, factors in shard_references.items():
                for head, handle in factors.items():
                    pieces.setdefault(head, []).append((index, handle))
        references = {head: self._assemble_factors(head, each) for head, each in pieces.items()}
        return Published(version, parts, references, momentum)

    async def _assembled(
        self,
        publishing: Awaitable[Published],
        ema: Awaitable[dict[int, Handle]],
        residual: Awaitable[dict[int, Handle]] | None,
    ) -> Published:
        published = await publishing
        parts = (published.parts, published.momentum, await ema, {} if residual is None else await residual)
        base, momentum, average, left = ({-1: self._assemble_base(each)} if each else {} for each in parts)
        return replace(published, parts=base, momentum=momentum, ema=average, residual=left)

    def _assemble_base(self, parts: Mapping[int, Handle]) -> AssembledRef:
        codec = self._codecs[0]
        pieces = [(handle, _ranges(codec.plan.base, codec.group_plans[index].base)) for index, handle in sorted(parts.items())]
        return AssembledRef(codec.plan.base.size, tuple(pieces))

    def _assemble_factors(self, head: int, pieces: Sequence[tuple[int, Handle]]) -> AssembledRef:
        codec = self._codecs[head]
        placed = []
        for index, handle in sorted(pieces, key=lambda piece: piece[0]):
            plan = codec.group_plans[index]
            factors = Layout(plan.contribution.entries[: 2 * len(plan.adapted)])
            placed.append((handle, _ranges(codec.plan.contribution, factors)))
        return AssembledRef(codec.plan.factors_size, tuple(placed))

    async def _gather(self, calls: Iterable[tuple[_ShardStub, Any]]) -> list[Any]:
        """The answers of calls. All calls are sent before the first answer is awaited.

        Raises:
            CoordinatorLost: a shard's process died.
        """
        return await asyncio.gather(*[_answer(shard.number, ref) for shard, ref in calls])


async def _answer(number: int, ref: Any) -> Any:
    try:
        return await ref
    except PROCESS_DIED as error:
        raise CoordinatorLost(f"The process of coordinator shard {number} died: {error}") from error


def _ranges(whole: Layout, part: Layout) -> tuple[tuple[int, int], ...]:
    """Where the entries of `part` lie in `whole`: [begin, end) each."""
    begins = {entry.name: entry.offset for entry in whole.entries}
    return tuple((begins[entry.name], begins[entry.name] + entry.size) for entry in part.entries)
