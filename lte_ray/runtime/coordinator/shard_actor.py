"""The process of one coordinator shard: a thin shell around `engine.BaseShard`, as an asyncio actor.

Contributions are fetched concurrently; what depends on the version is done in the order in which it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import ray
import torch
from torch import Tensor

from lte_ray import fault_injection
from lte_ray.engine.coordinator.aggregator import BaseShard
from lte_ray.engine.coordinator.base_weights import BaseVersion, TensorName
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import OuterStep
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
        state: the base, the references in it, its momentum, and its moving average.
    """

    def __init__(self, context: RunContext, plans: tuple[Plan, ...], number: int, state: CoordinatorState) -> None:
        fault_injection.arm(context.fault_script)
        self._transport = context.transport
        codecs, plan = context.codecs(plans), plans[0]
        plan_of = {index: subplan(plan, group.names) for index, group in enumerate(context.groups) if group.shard == number}
        with at_construction():
            base = context.transport.fetch(state.base)
            whole_momentum, whole_residual, whole_ema = (
                None if handle is None else context.transport.fetch(handle)
                for handle in (state.momentum, state.residual, state.ema)
            )
            if whole_ema is None and context.settings.train.ema:
                whole_ema = base
            factors_of = {head: context.transport.fetch(handle) for head, handle in state.references.items()}

        def slice_groups(flat: Tensor) -> dict[int, Tensor]:
            entries = views(plan.base, flat)
            return {index: gather(each.base, entries, torch.float32) for index, each in plan_of.items()}

        parts = slice_groups(base)
        momentum, residual, ema = (
            {} if flat is None else slice_groups(flat) for flat in (whole_momentum, whole_residual, whole_ema)
        )
        references: dict[int, dict[int, Tensor]] = {index: {} for index in plan_of}
        for head, factors in factors_of.items():
            for index in plan_of:
                references[index][head] = codecs[head].slice_factors(index, factors).clone()
        self._shard = BaseShard(
            codecs,
            parts,
            context.settings.lte.reset,
            version=state.version,
            references=references,
            momentum=momentum,
            send_down=context.settings.merge.send_down,
            residual=residual,
            ema=ema,
        )
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

    async def merge(
        self,
        turn: int,
        version: int,
        weights: Mapping[int, float],
        step: OuterStep | None = None,
        ema_keep: float | None = None,
    ) -> float:
        """Computes the next version from these tickets, by weight and step. Returns the seconds that its products took."""

        def merge() -> None:
            with torch_threads(self._threads):
                self._shard.merge(version, weights, step, ema_keep)

        await self._turns.run_in_turn(turn, merge)
        await self._catch_up()
        return self._shard.pop_seconds(version)

    async def publish(
        self, turn: int, groups: tuple[int, ...], references: bool, momentum: tuple[int, ...] = ()
    ) -> tuple[dict[int, Handle], dict[int, dict[int, Handle]], dict[int, Handle]]:
        """Publishes the version at this turn.

        Args:
            turn: as for all calls.
            groups: whose parts of the base are published.
            references: whether those of these groups are published, too.
            momentum: the groups whose momentum is published, too, if there is any.

        Returns:
            The base's parts by group, references by group and head, and the momentum's parts by group.
        """

        def publish(index: int, newest: BaseVersion) -> tuple[Handle, dict[int, Handle], Handle | None]:
            flat = {head: f for head, f in newest.references.items() if f is not None} if references else {}
            wanted = newest.momentum if index in momentum else None
            return (
                self._transport.publish(newest.base),
                {head: self._transport.publish(f) for head, f in flat.items()},
                None if wanted is None else self._transport.publish(wanted),
            )

        reads = await self._turns.run_in_turn(
            turn, lambda: {index: self._shard.schedule_read(index, partial(publish, index)) for index in groups}
        )
        await self._catch_up()
        published = {index: future.result() for index, future in reads.items()}
        return (
            {index: part for index, (part, _, _) in published.items()},
            {index: factors for index, (_, factors, _) in published.items()},
            {index: handle for index, (_, _, handle) in published.items() if handle is not None},
        )

    async def publish_each(self, turn: int, name: TensorName) -> dict[int, Handle]:
        """Publishes one of the tensors of the version at this turn, by group; of the groups that have it."""

        def publish(newest: BaseVersion) -> Handle | None:
            flat: Tensor | None = getattr(newest, name)
            return None if flat is None else self._transport.publish(flat)

        reads = await self._turns.run_in_turn(
            turn, lambda: {index: self._shard.schedule_read(index, publish) for index in self._shard.groups}
        )
        await self._catch_up()
        published = {index: future.result() for index, future in reads.items()}
        return {index: handle for index, handle in published.items() if handle is not None}

    async def checksum(self, turn: int) -> int:
        """The sum of the checksums, of base and momentum, of this shard's groups that heads redo."""

        def checksum(newest: BaseVersion) -> int:
            return base_checksum(newest.base) + (0 if newest.momentum is None else base_checksum(newest.momentum))

        reads = await self._turns.run_in_turn(
            turn, lambda: [self._shard.schedule_read(index, checksum) for index in self._shard.redone_groups]
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
