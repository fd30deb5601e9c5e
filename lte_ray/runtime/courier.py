"""Carries contributions to the coordinator and updates back, at once or beside the training thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from torch import Tensor

from lte_ray.engine.head import Head
from lte_ray.engine.mirror import Mirror, OutOfReach
from lte_ray.errors import CoordinatorLost, LTEError
from lte_ray.layout import Plan
from lte_ray.merging.transfer import Codec
from lte_ray.messages import Contribution, Update
from lte_ray.runtime.common import Common


@dataclass(frozen=True)
class Arrived:
    """An update that has come, and the base that it led to (flat), if that is newer than what this process had.

    `staged` is what the process's only head makes of that base (`Head.stage`), with its contribution or without (`accepted`).
    """

    update: Update
    base: Tensor | None
    accepted: bool = False
    staged: dict[str, Tensor] = field(default_factory=dict)


class Courier:
    """The way between the heads of one process and the coordinator.

    Args:
        common: as every actor.
        plans: all heads'.
        numbers: of the heads here.
        coordinator: its handle.
    """

    def __init__(self, common: Common, plans: Sequence[Plan], numbers: Sequence[int], coordinator: Any) -> None:
        merge = common.settings.merge
        self._transport, self._coordinator, self._numbers = common.transport, coordinator, tuple(numbers)
        self._codecs = [Codec(plan, common.groups, merge) for plan in plans]
        self.mirror = Mirror(
            self._codecs, common.settings.lte.reset, common.transport.fetch, numbers, common.threads(plans[0], plans[0])
        )
        self.bytes_up = dict.fromkeys(numbers, 0)
        self._pool = ThreadPoolExecutor(len(numbers) + 1, "courier")
        self._sent: dict[Future[Arrived], int] = {}  # by whose head
        self._watching: Future[Arrived] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._swapped: torch.cuda.Event | None = None

    def join(self, plans: Mapping[int, Plan]) -> Arrived:
        """The base to start from; `plans` are those of the models that were built here."""
        with asking():
            return self.take(ray.get(self._coordinator.join.remote(plans)))

    def offer(self, head: Head, contribution: Contribution) -> Any:
        """Sends a contribution; gives Ray's reference to the answer."""
        encoded = head.encode(contribution, self._codecs[head.head])
        self.bytes_up[head.head] += sum(buffer.nbytes for buffer in encoded.buffer)
        handles = tuple(self._transport.publish(buffer) for buffer in encoded.buffer)
        return self._coordinator.submit.remote(replace(encoded, buffer=handles), self._numbers, self.mirror.have)

    def take(self, update: Update) -> Arrived:
        """Fetches what an update leads to. If there is a base, `adopted` has to follow."""
        try:
            return Arrived(update, self.mirror.take(update))
        except OutOfReach:
            with asking():
                whole = ray.get(self._coordinator.newer.remote(self._numbers, update.version - 1, -1))
            return self.take(replace(whole, verdict=update.verdict, checkpoint=update.checkpoint))

    def adopted(self, head: Head) -> None:
        """The base that came last isn't needed any more."""
        if head.device.type == "cuda":
            self._swapped = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._swapped.record(torch.cuda.current_stream(head.device))
        self.mirror.release()

    # -- beside training ---------------------------------------------------------------------------------------------

    def send(self, head: Head, contribution: Contribution) -> None:
        """Sends a contribution and fetches what the answer leads to, in another thread."""
        ready = torch.cuda.Event() if head.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record(torch.cuda.current_stream(head.device))
        self._sent[self._pool.submit(self._carry, head, contribution, ready)] = head.head

    def carries(self, head: Head) -> bool:
        """Whether the answer to this head's last contribution is still to come, even if its verdict is known by another."""
        return head.head in self._sent.values()

    def watch(self, head: Head, version: int) -> None:
        """Asks to be told of a version newer than `version`, whatever becomes of contributions; one question at a time."""
        if self._watching is None:
            self._watching = self._pool.submit(self._look_out, head, version)

    def arrived(self, patience: float = 0) -> list[Arrived]:
        """What has come since the last call, after up to `patience` seconds if there is nothing."""
        waiting = {*self._sent, *([self._watching] if self._watching else [])}
        done, _ = wait(waiting, patience, FIRST_COMPLETED) if waiting else (set(), None)
        for future in done:
            self._sent.pop(future, None)
        if self._watching in done:
            self._watching = None
        return sorted((future.result() for future in done), key=lambda arrived: arrived.update.version)

    def _carry(self, head: Head, contribution: Contribution, ready: Any) -> Arrived:
        if ready is None:
            reference = self.offer(head, contribution)
        else:
            with torch.cuda.stream(self._side(head)):  # so that copying out doesn't wait for the steps that follow
                self._side(head).wait_event(ready)
                reference = self.offer(head, contribution)
        with asking():
            update = ray.get(reference)
        return self._staged(head, self.take(update))

    def _look_out(self, head: Head, version: int) -> Arrived:
        with asking():
            update = ray.get(self._coordinator.newer.remote(self._numbers, version, self.mirror.have))
        return self._staged(head, self.take(update))

    def _staged(self, head: Head, arrived: Arrived) -> Arrived:
        """Computes what the head will adopt, so that it stands still only to put it in place."""
        if arrived.base is None or len(self._numbers) > 1:
            return arrived
        accepted = head.outstanding and arrived.update.accepted.get(head.head) == head.sequence
        if head.device.type != "cuda":
            return replace(arrived, accepted=accepted, staged=head.stage(arrived.base, accepted))
        with torch.cuda.stream(self._side(head)):
            if self._swapped is not None:  # until then kernels that were queued before may read the weights to be written to
                self._side(head).wait_event(self._swapped)
            staged = head.stage(arrived.base, accepted)
            self._side(head).synchronize()
        return replace(arrived, accepted=accepted, staged=staged)

    def _side(self, head: Head) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream(head.device)  # type: ignore[no-untyped-call]
        return self._stream


@contextmanager
def asking() -> Iterator[None]:
    """Turns Ray's errors about the coordinator into ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LTEError) else error) from None
    except ray.exceptions.RayActorError as error:
        raise CoordinatorLost(f"The coordinator's process died: {error}") from error
