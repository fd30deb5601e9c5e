"""The process of one coordinator shard: a thin shell around `engine.Shard`, as an asyncio actor. `ray.remote` is applied in
`session`.

Contributions are fetched beside each other; what depends on the version is done in the order in which it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from lte_ray import fault_injection
from lte_ray.engine.coordinator.aggregator import BaseShard
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.object_store import Handle, at_construction
from lte_ray.transfer.checksum import base_checksum, verify_checksums
from lte_ray.transfer.groups import subplan

T = TypeVar("T")


class Turns:
    """Puts calls into the order in which they were sent, since Ray promises none for those of an asyncio actor."""

    def __init__(self) -> None:
        self._passed = 0
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    async def wait_for_turn(self, turn: int) -> None:
        """Waits until as many calls have taken their turn."""
        while self._passed < turn:
            there: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(turn, []).append(there)
            await there

    async def run_in_turn(self, turn: int, action: Callable[[], T]) -> T:
        """Does something (that doesn't wait) when `turn` calls have taken theirs."""
        await self.wait_for_turn(turn)
        try:
            return action()
        finally:
            self._passed += 1
            for there in self._waiting.pop(self._passed, ()):
                there.set_result(None)


class ShardActor:
    """Decodes, checks and merges some groups' part of every contribution.

    Args:
        common: as every actor.
        plans: each head's.
        number: of this shard.
        start: the base, and the references in it.
    """

    def __init__(self, common: RunContext, plans: tuple[Plan, ...], number: int, start: CoordinatorState) -> None:
        fault_injection.arm(common.fault_script)
        self._transport, settings = common.transport, common.settings
        codecs, plan = common.codecs(plans), plans[0]
        groups = {index: subplan(plan, group.names) for index, group in enumerate(common.groups) if group.shard == number}
        with at_construction():
            whole = common.transport.fetch(start.base)
            factors_of = {head: common.transport.fetch(handle) for head, handle in start.references.items()}
        entries = views(plan.base, whole)
        masters = {index: gather(own.base, entries, torch.float32) for index, own in groups.items()}
        references: dict[int, dict[int, Tensor]] = {index: {} for index in groups}
        for head, factors in factors_of.items():
            for index in groups:
                references[index][head] = codecs[head].slice_factors(index, factors).clone()
        self._shard = BaseShard(codecs, masters, settings.lte.reset, version=start.version, references=references)
        mine = [codecs[0].group_plans[index] for index in groups]
        own = Plan(tuple(a for each in mine for a in each.adapted), ())
        self._threads = common.merge_threads(own, plans[0])
        self._beside = ThreadPoolExecutor(1, "merge")
        self._turns = Turns()

    async def receive(self, turn: int, ticket: int, head: int, sent: Mapping[int, tuple[Handle, int]]) -> float | str:
        """The sum of squares of this shard's part of a contribution, or why it can't be decoded."""
        inject("shard receives", head=head)
        buffers = {index: await self._transport.fetch_async(handle) for index, (handle, _) in sent.items()}
        await self._turns.wait_for_turn(turn)  # the reference changes with the merges before it
        try:
            verify_checksums(list(buffers.values()), [checksum for _, checksum in sent.values()])
            with torch_threads(self._threads):
                return self._shard.receive(ticket, head, buffers)
        except ValueError as error:
            return str(error)

    async def discard(self, ticket: int) -> None:
        """The contribution won't be merged."""
        self._shard.discard(ticket)

    async def forget_head(self, turn: int, head: int) -> None:
        """A head begins with B = 0."""
        await self._turns.run_in_turn(turn, lambda: self._shard.forget_head(head))

    async def merge(self, turn: int, version: int, weights: Mapping[int, float]) -> float:
        """The next version, from these tickets by weight; gives the seconds that its products took."""

        def merge() -> None:
            with torch_threads(self._threads):
                self._shard.merge(version, weights)

        await self._turns.run_in_turn(turn, merge)
        await self._caught_up()
        return self._shard.pop_seconds(version)

    async def publish(self, turn: int, groups: tuple[int, ...], references: bool) -> tuple[dict[int, Handle], dict[int, Any]]:
        """These groups' parts of the version that this turn finds, by group; and the references in them, by group and head."""

        def use(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> tuple[Handle, dict[int, Handle]]:
            factors = {h: f for h, f in held.items() if f is not None} if references else {}
            return self._transport.publish(base), {h: self._transport.publish(f) for h, f in factors.items()}

        found = await self._turns.run_in_turn(turn, lambda: {index: self._shard.schedule_read(index, use) for index in groups})
        await self._caught_up()
        done = {index: future.result() for index, future in found.items()}
        return {i: handle for i, (handle, _) in done.items()}, {i: held for i, (_, held) in done.items()}

    async def checksum(self, turn: int) -> int:
        """Of this shard's groups that heads redo from factors."""

        def use(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> int:
            return base_checksum(base)

        found = await self._turns.run_in_turn(
            turn, lambda: [self._shard.schedule_read(index, use) for index in self._shard.factored_groups]
        )
        await self._caught_up()
        return sum(future.result() for future in found) % 2**64

    @ray.method(concurrency_group="ctl")
    async def alive(self) -> bool:
        """Answers."""
        return True

    async def _caught_up(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._beside, self._catch_up)

    def _catch_up(self) -> None:
        with torch_threads(self._threads):
            self._shard.catch_up()
