"""Carries contributions to the coordinator and updates back, at once or beside the training thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lte_ray.engine.head import Head
from lte_ray.engine.mirror import Mirror, OutOfReach
from lte_ray.layout import Plan
from lte_ray.merging.transfer import Codec, seal
from lte_ray.messages import Contribution, HeadReport, Report, Update
from lte_ray.points import reached
from lte_ray.runtime.common import Common
from lte_ray.runtime.knowledge import Knowledge
from lte_ray.runtime.line import Cut, Line
from lte_ray.runtime.transport import Gone


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
        line: to the coordinator.
        beside: whether contributions are made ready and sent while the heads train on.
    """

    def __init__(self, common: Common, plans: Sequence[Plan], numbers: Sequence[int], line: Line, beside: bool) -> None:
        merge = common.settings.merge
        self._transport, self._line, self._numbers, self._beside = common.transport, line, tuple(numbers), beside
        self._codecs = [Codec(plan, common.groups, merge) for plan in plans]
        self.mirror = Mirror(
            self._codecs, common.settings.lte.reset, common.transport.fetch, numbers, common.threads(plans[0], plans[0])
        )
        self._knowledge = Knowledge({number: plans[number] for number in numbers}, common.settings.lte.reset)
        self._fence = threading.Lock()  # between what comes from a coordinator and the end of its time
        self.bytes_up = dict.fromkeys(numbers, 0)
        self._pool = ThreadPoolExecutor(len(numbers) + 1, "courier")
        self._aside = ThreadPoolExecutor(1, "aside")  # the others may be waiting for answers
        self._sent: dict[Future[Arrived], int] = {}  # by whose head
        self._watching: Future[Arrived] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._swapped: torch.cuda.Event | None = None

    def join(self, plans: Mapping[int, Plan], incarnation: int) -> Arrived:
        """The base to start from; `plans` are those of the models that were built here."""
        while True:
            epoch, update = self._line.call("join", plans, incarnation)
            try:
                return self._take(update, epoch)
            except Cut:
                continue

    def begins(self, head: Head, reference: Tensor | None) -> None:
        """A head here has started with this reference."""
        self._knowledge.begins(head.head, head.merged.sequence, reference)

    def leave(self, head: int) -> None:
        """A head has ended."""
        self._line.call("leave", head)

    def adopted(self, head: Head) -> None:
        """The base that came last isn't needed any more."""
        if head.device.type == "cuda":
            self._swapped = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._swapped.record(torch.cuda.current_stream(head.device))
        self.mirror.release()

    def report(self, positions: Mapping[int, HeadReport], epoch: int) -> Report:
        """What this process knows, for the coordinator of that number; what earlier ones have sent doesn't count any more."""
        with self._fence:
            self._line.cut(epoch)
        return self.mirror.read(lambda base: self._report(base, positions))

    def _report(self, base: Tensor | None, positions: Mapping[int, HeadReport]) -> Report:
        with self._fence:  # always after the mirror's own lock
            return self._knowledge.report(base, positions, self._transport)

    # -- contributions and answers -----------------------------------------------------------------------------------

    def send(self, head: Head, contribution: Contribution) -> None:
        """Sends a contribution and fetches what the answer leads to; in another thread, what needn't keep the head."""
        if not self._beside:
            encoded = self._publish(head, contribution)
            self._sent[self._pool.submit(self._ask, head, encoded)] = head.head
            return
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

    def beside(self, work: Callable[[], None]) -> None:
        """Does something in another thread."""
        self._aside.submit(work)

    def tell(self, method: str, *args: Any) -> None:
        """Tells the coordinator something."""
        self._line.call(method, *args)

    def arrived(self, patience: float = 0) -> list[Arrived]:
        """What has come since the last call, after up to `patience` seconds if there is nothing."""
        waiting = {*self._sent, *([self._watching] if self._watching else [])}
        done, _ = wait(waiting, patience, FIRST_COMPLETED) if waiting else (set(), None)
        for future in done:
            self._sent.pop(future, None)
        if self._watching in done:
            self._watching = None
        return sorted((future.result() for future in done), key=lambda arrived: arrived.update.version)

    def _publish(self, head: Head, contribution: Contribution) -> Contribution:
        encoded = head.encode(contribution, self._codecs[head.head])
        self.bytes_up[head.head] += sum(buffer.nbytes for buffer in encoded.buffer)
        sealed = replace(
            encoded, seals=tuple(seal([b]) for b in encoded.buffer), buffer=tuple(map(self._transport.publish, encoded.buffer))
        )
        with self._fence:
            self._knowledge.offered(sealed, head.offer)
        return sealed

    def _carry(self, head: Head, contribution: Contribution, ready: Any) -> Arrived:
        if ready is None:
            return self._ask(head, self._publish(head, contribution))
        with torch.cuda.stream(self._side(head)):  # so that copying out doesn't wait for the steps that follow
            self._side(head).wait_event(ready)
            encoded = self._publish(head, contribution)
        return self._ask(head, encoded)

    def _ask(self, head: Head, encoded: Contribution) -> Arrived:
        """The answer to a contribution, of whatever coordinator is there to give it."""
        while True:
            reached("sent", head=encoded.head, step=encoded.step)
            epoch, update = self._line.call("submit", encoded, self._numbers, self.mirror.have)
            reached("answered", head=encoded.head, step=encoded.step)
            try:
                return self._staged(head, self._take(update, epoch))
            except Cut:
                continue

    def _look_out(self, head: Head, version: int) -> Arrived:
        while True:
            epoch, update = self._line.call("newer", self._numbers, version, self.mirror.have)
            try:
                return self._staged(head, self._take(update, epoch))
            except Cut:
                continue

    def _take(self, update: Update, epoch: int) -> Arrived:
        """Fetches what an update leads to. If there is a base, `adopted` has to follow.

        Raises:
            Cut: the coordinator that sent it is gone, and with it what it has merged.
        """
        while True:
            try:
                base = self.mirror.take(update, partial(self._note, update, epoch))
            except (OutOfReach, Gone):
                if self._line.epoch != epoch:
                    raise Cut from None
                now, whole = self._line.call("newer", self._numbers, -1, -1)
                if now != epoch:
                    raise Cut from None
                update = replace(whole, verdict=update.verdict, saves=(*update.saves, *whole.saves))
            else:
                return Arrived(update, base)

    def _note(self, update: Update, epoch: int) -> None:
        """An update was fetched; if it still counts, it's known from now on."""
        with self._fence:
            if self._line.epoch != epoch:
                raise Cut
            self._knowledge.learned(update)

    def _staged(self, head: Head, arrived: Arrived) -> Arrived:
        """Computes what the head will adopt, so that it stands still only to put it in place."""
        if arrived.base is None or len(self._numbers) > 1 or not self._beside:
            return arrived
        accepted = head.outstanding and arrived.update.holds(head.head, head.sequence)
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
