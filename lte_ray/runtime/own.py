"""The main weights in the coordinator's own process: products are computed in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.threads import torch_threads
from lte_ray.merging.flat import gather, views
from lte_ray.merging.transfer import Codec, check_seals, checksum
from lte_ray.runtime.common import Common
from lte_ray.runtime.publisher import Published
from lte_ray.runtime.transport import Handle

T = TypeVar("T")


class OwnMaster:
    """`Masters` of an `engine.Coordinator` that holds the base itself.

    Args:
        common: as every actor.
        engine: the coordinator.
        codecs: each head's.
        threads: that torch computes with.
    """

    def __init__(self, common: Common, engine: Coordinator, codecs: Sequence[Codec], threads: int) -> None:
        self._transport, self._engine, self._codecs, self._threads = common.transport, engine, codecs, threads
        self._beside = ThreadPoolExecutor(1, "merge")

    async def receive(self, ticket: int, head: int, handles: Sequence[Handle], seals: Sequence[int]) -> Tensor:
        buffers = [await self._transport.arrive(handle) for handle in handles]
        check_seals(buffers, seals)
        # Nobody changes the reference meanwhile: it is this head's, which has nothing else outstanding.
        return self._codecs[head].decode(dict(enumerate(buffers)), self._engine.reference(head))

    def forget(self, ticket: int) -> None:
        """The engine keeps what isn't decided."""

    def renew(self, head: int) -> None:
        """The engine has forgotten what it held of it."""

    async def merged(self, version: int, weights: Mapping[int, float]) -> float:
        await self._caught_up()
        return self._engine.master.seconds(version)

    def parts(self, groups: Sequence[int], references: bool) -> Coroutine[Any, Any, Published]:
        def publish(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> Published:
            return Published(
                version,
                {index: self._transport.publish(self._part(index, base)) for index in groups},
                {h: self._transport.publish(factors) for h, factors in held.items() if references and factors is not None},
            )

        return self._after(self._engine.master.at(publish))

    def whole(self, references: bool = False) -> Coroutine[Any, Any, Published]:
        def publish(version: int, base: Tensor, held: Mapping[int, Tensor | None]) -> Published:
            known = {h: f for h, f in held.items() if f is not None} if references else {}
            return Published(
                version, {-1: self._transport.publish(base)}, {h: self._transport.publish(f) for h, f in known.items()}
            )

        return self._after(self._engine.master.at(publish))

    def checksum(self) -> Coroutine[Any, Any, int]:
        return self._after(self._engine.master.at(lambda version, base, held: self._sum(base)))

    async def _after(self, result: Future[T]) -> T:
        await self._caught_up()
        return result.result()

    async def _caught_up(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._beside, self._catch_up)

    def _catch_up(self) -> None:
        with torch_threads(self._threads):
            self._engine.master.catch_up()

    def _part(self, index: int, base: Tensor) -> Tensor:
        codec = self._codecs[0]
        return base if len(codec.parts) == 1 else gather(codec.parts[index].base, views(codec.plan.base, base), base.dtype)

    def _sum(self, base: Tensor) -> int:
        entries = views(self._engine.plan.base, base)
        names = [name for group in self._codecs[0].groups if group.by_factors for name in group.names]
        return sum(checksum(entries[name]) for name in names) % 2**64
