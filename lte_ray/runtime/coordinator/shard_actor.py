"""The process of one coordinator shard: a thin shell around `engine.BaseShard`, as an asyncio actor.

Contributions are fetched concurrently; what depends on the version is done in the order in which it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
    """Runs calls in the order in which they were sent, which Ray doesn't promise for an asyncio actor."""

    def __init__(self) -> None:
        self._passed = 0
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    async def wait_for_turn(self, turn: int) -> None:
        """Waits until `turn` calls have taken their turn."""
        while self._passed < turn:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(turn, []).append(future)
            await future

    async def run_in_turn(self, turn: int, action: Callable[[], T]) -> T:
        """Calls `action`, which must not wait, once `turn` calls have taken their turn."""
        await self.wait_for_turn(turn)
        try:
            return action()
        finally:
            self._passed += 1
            for future in self._waiting.pop(self._passed, ()):
                future.set_result(None)


class ShardActor:
    """Decodes, checks and merges some groups' part of every contribution.

    Calls with a `turn` are carried out in the order of their turns.

    Args:
        context: as for every actor.
        plans: each head's.
        number: of this shard.
        state: the base, and the references in it.
    """

    def __init__(self, context: RunContext, plans: tuple[Plan, ...], number: int, state: CoordinatorState) -> None:
        fault_injection.arm(context.fault_script)
        self._transport = context.transport
        codecs, plan = context.codecs(plans), plans[0]
        plan_of = {index: subplan(plan, group.names) for index, group in enumerate(context.groups) if group.shard == number}
        with at_construction():
            base = context.transport.fetch(state.base)
            factors_of = {head: context.transport.fetch(handle) for head, handle in state.references.items()}
        entries = views(plan.base, base)
        parts = {index: gather(each.base, entries, torch.float32) for index, each in plan_of.items()}
        references: dict[int, dict[int, Tensor]] = {index: {} for index in plan_of}
        for head, factors in factors_of.items():
            for index in plan_of:
                references[index][head] = codecs[head].slice_factors(index, factors).clone()
        reset = context.settings.lte.reset
        self._shard = BaseShard(codecs, parts, reset, version=state.version, references=references)
        adapted = tuple(weight for index in plan_of for weight in codecs[0].group_plans[index].adapted)
        self._threads = context.merge_threads(Plan(adapted, ()), plan)
        self._executor = ThreadPoolExecutor(1, "merge")
        self._turns = Turns()

    async def receive(self, turn: int, ticket: int, head: int, buffers: Mapping[int, tuple[Handle, int]]) -> float | str:
        """Fetches and decodes this shard's part of a contribution.

        Args:
            turn: how many calls must take their turn first. This call takes none.
            ticket: of the contribution.
            head: whose it is.
            buffers: by group, a handle and its checksum.

        Returns:
            The sum of squares of its elements, or why it can't be decoded.
        """
        inject("shard receives", head=head)
        fetched = {index: await self._transport.fetch_async(handle) for index, (handle, _) in buffers.items()}
        await self._turns.wait_for_turn(turn)  # the reference changes with the merges before it
        try:
            verify_checksums(list(fetched.values()), [checksum for _, checksum in buffers.values()])
            with torch_threads(self._threads):
                return self._shard.receive(ticket, head, fetched)
        except ValueError as error:
            return str(error)

    async def discard(self, ticket: int) -> None:
        """The contribution won't be merged."""
        self._shard.discard(ticket)

    async def forget_head(self, turn: int, head: int) -> None:
        """A head begins with B = 0."""
        await self._turns.run_in_turn(turn, lambda: self._shard.forget_head(head))

    async def merge(self, turn: int, version: int, weights: Mapping[int, float]) -> float:
        """Computes the next version from these tickets, by weight. Returns the seconds that its products took."""

        def merge() -> None:
            with torch_threads(self._threads):
                self._shard.merge(version, weights)

        await self._turns.run_in_turn(turn, merge)
        await self._catch_up()
        return self._shard.pop_seconds(version)

    async def publish(
        self, turn: int, groups: tuple[int, ...], references: bool
    ) -> tuple[dict[int, Handle], dict[int, dict[int, Handle]]]:
        """Publishes these groups' parts of the version at this turn, by group; and its references, by group and head."""

        def publish(version: int, base: Tensor, factors: Mapping[int, Tensor | None]) -> tuple[Handle, dict[int, Handle]]:
            flat = {head: f for head, f in factors.items() if f is not None} if references else {}
            return self._transport.publish(base), {head: self._transport.publish(f) for head, f in flat.items()}

        reads = await self._turns.run_in_turn(
            turn, lambda: {index: self._shard.schedule_read(index, publish) for index in groups}
        )
        await self._catch_up()
        published = {index: future.result() for index, future in reads.items()}
        return {i: part for i, (part, _) in published.items()}, {i: factors for i, (_, factors) in published.items()}

    async def checksum(self, turn: int) -> int:
        """The sum of the checksums of this shard's groups that heads redo from factors."""

        def checksum(version: int, base: Tensor, factors: Mapping[int, Tensor | None]) -> int:
            return base_checksum(base)

        reads = await self._turns.run_in_turn(
            turn, lambda: [self._shard.schedule_read(index, checksum) for index in self._shard.factored_groups]
        )
        await self._catch_up()
        return sum(future.result() for future in reads) % 2**64

    @ray.method(concurrency_group="ctl")
    async def alive(self) -> bool:
        """Always True, if the process answers at all."""
        return True

    async def _catch_up(self) -> None:
        def catch_up() -> None:
            with torch_threads(self._threads):
                self._shard.catch_up()

        await asyncio.get_running_loop().run_in_executor(self._executor, catch_up)
