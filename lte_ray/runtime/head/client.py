"""Carries contributions to the coordinator and updates back, at once or beside the training thread.

A head process's line to the coordinator, which may be cut, and connected to another one.

What a head's process knows of the run, from which a new coordinator goes on if the old one dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
import torch
from torch import Tensor

from lte_ray.engine.head.base_replica import BaseReplica, CannotRedoMerges
from lte_ray.engine.head.head import Head
from lte_ray.errors import CoordinatorLost, LTEError
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import factors_part
from lte_ray.messages import CommittedPosition, Contribution, CoordinatorReply, HeadReport, RecoveryReport
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import ObjectLost, Transport
from lte_ray.runtime.ray_errors import DEAD
from lte_ray.transfer.checksum import buffers_checksum
from lte_ray.transfer.codec import Codec

AGAIN = 0.5
"""Seconds after which a call is made again to a coordinator that can't be reached for the moment."""


class StaleCoordinator(Exception):
    """The coordinator that gave an answer is gone: what it says doesn't count any more."""


class ReconnectingStub:
    """Calls the coordinator; while there is none, calls wait for the next.

    Args:
        coordinator: its handle.
        epoch: how many there were before it.
    """

    def __init__(self, coordinator: Any, epoch: int) -> None:
        self._coordinator, self.epoch = coordinator, epoch
        self._changed = threading.Condition()
        self._waiting: float | None = None

    def connect(self, coordinator: Any, epoch: int) -> None:
        """Another coordinator answers from now on."""
        with self._changed:
            self._coordinator, self.epoch = coordinator, epoch
            self._changed.notify_all()

    def cut(self, epoch: int) -> None:
        """Answers of coordinators before `epoch` don't count any more, and calls wait for that one."""
        with self._changed:
            if epoch > self.epoch:
                self._coordinator, self.epoch = None, epoch

    @property
    def waiting(self) -> float:
        """For how many seconds calls have been waiting for a coordinator that can be reached; 0 if none is."""
        since = self._waiting
        return 0.0 if since is None else time.monotonic() - since

    def call(self, method: str, *args: Any) -> tuple[int, Any]:
        """What the coordinator answers, and which one it was. As often as it takes: it knows repeats.

        Raises:
            LTEError: it has failed for good.
        """
        while True:
            with self._changed:
                while self._coordinator is None:
                    self._waiting = self._waiting or time.monotonic()
                    self._changed.wait()
                coordinator, epoch = self._coordinator, self.epoch
            try:
                answer = ray.get(getattr(coordinator, method).remote(*args))
                self._waiting = None
                return epoch, answer
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, CoordinatorLost | ObjectLost):  # one of its shards, or what it was to fetch, is gone
                    self._await_another(epoch)
                    continue
                raise (error.cause if isinstance(error.cause, LTEError) else error) from None
            except DEAD as error:
                if isinstance(error, ray.exceptions.ActorUnavailableError):
                    with self._changed:
                        self._waiting = self._waiting or time.monotonic()
                        self._changed.wait(AGAIN)
                else:
                    self._await_another(epoch)

    def _await_another(self, epoch: int) -> None:
        with self._changed:
            self._waiting = self._waiting or time.monotonic()
            if self.epoch == epoch:
                self._coordinator = None


NOWHERE = HeadReport(-1, 0)
"""Of a head that hasn't begun."""


@dataclass
class _Own:
    """Of a head here: its factors by the contribution that they follow (None where B' = 0), and what isn't answered yet.

    `ordered` is what orders say that came here, whether the head has taken them or is about to.
    """

    factors: dict[int, Tensor | None] = field(default_factory=dict)
    outstanding: Contribution | None = None
    ordered: HeadReport = NOWHERE


class RecoveryCache:
    """Keeps, beside training, the newest version that came here with what it holds, and this process's own contributions.

    Args:
        plans: all heads'.
        numbers: of the heads here.
        reset: as `LTEConfig.reset`.
    """

    def __init__(self, plans: Mapping[int, Plan], reset: str) -> None:
        self._plans, self._reset = plans, reset
        self._own = {number: _Own() for number in plans}
        self.version, self.held, self.ledger = -1, dict[int, CommittedPosition](), dict[str, Any]()

    def begins(self, head: int, sequence: int, factors: Tensor | None) -> None:
        """A head here starts with these factors in the base."""
        self._own[head].factors[sequence] = factors

    def offered(self, contribution: Contribution, flat: Tensor) -> None:
        """A head here sends a contribution; `flat` is what receivers make of it."""
        own, plan = self._own[contribution.head], self._plans[contribution.head]
        own.outstanding = contribution
        own.factors[contribution.sequence] = None if self._reset == "B" else factors_part(plan, flat)

    def learned(self, update: CoordinatorReply) -> None:
        """An update has come, and its base is here."""
        if update.verdict is not None and not update.verdict.accepted:
            self._settle(update.verdict.head, update.verdict.sequence, accepted=False)
        for head in self._own.keys() & update.orders.keys():
            own, order = self._own[head], update.orders[head]
            grant = max([own.ordered.grant, *(grant.id for grant in order.grants)])
            released = max(own.ordered.released, order.release)
            own.ordered = HeadReport(-1, max(own.ordered.limit, order.limit), grant, released)
        if update.version <= self.version:
            return
        self.version, self.held, self.ledger = update.version, update.held, update.ledger
        for head in self._own:
            if head in update.held:
                self._settle(head, update.held[head].sequence, accepted=True)

    def _settle(self, head: int, sequence: int, accepted: bool) -> None:
        own = self._own[head]
        if own.outstanding is None or own.outstanding.sequence != sequence:
            return
        own.outstanding = None
        own.factors = {s: f for s, f in own.factors.items() if (s == sequence) == accepted}

    def report(self, base: Tensor | None, positions: Mapping[int, HeadReport], transport: Transport) -> RecoveryReport:
        """All of it, published; `positions` are those of the heads that have begun."""
        heads = {}
        for head, own in self._own.items():
            known = {s: None if f is None else transport.publish(f) for s, f in own.factors.items()}
            at, said = positions.get(head, NOWHERE), own.ordered
            limit, grant, released = (max(getattr(at, f), getattr(said, f)) for f in ("limit", "grant", "released"))
            heads[head] = HeadReport(at.step, limit, grant, released, known)
        return RecoveryReport(self.version, None if base is None else transport.publish(base), self.held, self.ledger, heads)


@dataclass(frozen=True)
class ReceivedReply:
    """An update that has come, and the base that it led to (flat), if that is newer than what this process had.

    `staged` is what the process's only head makes of that base (`Head.stage`), with its contribution or without (`accepted`).
    """

    update: CoordinatorReply
    base: Tensor | None
    accepted: bool = False
    staged: dict[str, Tensor] = field(default_factory=dict)


class CoordinatorClient:
    """The way between the heads of one process and the coordinator.

    Args:
        common: as every actor.
        plans: all heads'.
        numbers: of the heads here.
        line: to the coordinator.
        beside: whether contributions are made ready and sent while the heads train on.
    """

    def __init__(
        self, common: RunContext, plans: Sequence[Plan], numbers: Sequence[int], line: ReconnectingStub, beside: bool
    ) -> None:
        merge = common.settings.merge
        self._transport, self._line, self._numbers, self._beside = common.transport, line, tuple(numbers), beside
        self._codecs = [Codec(plan, common.groups, merge) for plan in plans]
        self.mirror = BaseReplica(
            self._codecs, common.settings.lte.reset, common.transport.fetch, numbers, common.threads(plans[0], plans[0])
        )
        self._knowledge = RecoveryCache({number: plans[number] for number in numbers}, common.settings.lte.reset)
        self._fence = threading.Lock()  # between what comes from a coordinator and the end of its time
        self.bytes_up = dict.fromkeys(numbers, 0)
        self._pool = ThreadPoolExecutor(len(numbers) + 1, "courier")
        self._aside = ThreadPoolExecutor(1, "aside")  # the others may be waiting for answers
        self._sent: dict[Future[ReceivedReply], int] = {}  # by whose head
        self._watching: Future[ReceivedReply] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._swapped: torch.cuda.Event | None = None

    def join(self, plans: Mapping[int, Plan], incarnation: int) -> ReceivedReply:
        """The base to start from; `plans` are those of the models that were built here."""
        while True:
            epoch, update = self._line.call("join", plans, incarnation)
            try:
                return self._take(update, epoch)
            except StaleCoordinator:
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

    def report(self, positions: Mapping[int, HeadReport], epoch: int) -> RecoveryReport:
        """What this process knows, for the coordinator of that number; what earlier ones have sent doesn't count any more."""
        with self._fence:
            self._line.cut(epoch)
        return self.mirror.read(lambda base: self._report(base, positions))

    def _report(self, base: Tensor | None, positions: Mapping[int, HeadReport]) -> RecoveryReport:
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

    def arrived(self, patience: float = 0) -> list[ReceivedReply]:
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
            encoded,
            seals=tuple(buffers_checksum([b]) for b in encoded.buffer),
            buffer=tuple(map(self._transport.publish, encoded.buffer)),
        )
        with self._fence:
            self._knowledge.offered(sealed, head.offer)
        return sealed

    def _carry(self, head: Head, contribution: Contribution, ready: Any) -> ReceivedReply:
        if ready is None:
            return self._ask(head, self._publish(head, contribution))
        with torch.cuda.stream(self._side(head)):  # so that copying out doesn't wait for the steps that follow
            self._side(head).wait_event(ready)
            encoded = self._publish(head, contribution)
        return self._ask(head, encoded)

    def _ask(self, head: Head, encoded: Contribution) -> ReceivedReply:
        """The answer to a contribution, of whatever coordinator is there to give it."""
        while True:
            inject("sent", head=encoded.head, step=encoded.step)
            epoch, update = self._line.call("submit", encoded, self._numbers, self.mirror.have)
            inject("answered", head=encoded.head, step=encoded.step)
            try:
                return self._staged(head, self._take(update, epoch))
            except StaleCoordinator:
                continue

    def _look_out(self, head: Head, version: int) -> ReceivedReply:
        while True:
            epoch, update = self._line.call("newer", self._numbers, version, self.mirror.have)
            try:
                return self._staged(head, self._take(update, epoch))
            except StaleCoordinator:
                continue

    def _take(self, update: CoordinatorReply, epoch: int) -> ReceivedReply:
        """Fetches what an update leads to. If there is a base, `adopted` has to follow.

        Raises:
            Cut: the coordinator that sent it is gone, and with it what it has merged.
        """
        while True:
            try:
                base = self.mirror.take(update, partial(self._note, update, epoch))
            except (CannotRedoMerges, ObjectLost):
                if self._line.epoch != epoch:
                    raise StaleCoordinator from None
                now, whole = self._line.call("newer", self._numbers, -1, -1)
                if now != epoch:
                    raise StaleCoordinator from None
                update = replace(whole, verdict=update.verdict, saves=(*update.saves, *whole.saves))
            else:
                return ReceivedReply(update, base)

    def _note(self, update: CoordinatorReply, epoch: int) -> None:
        """An update was fetched; if it still counts, it's known from now on."""
        with self._fence:
            if self._line.epoch != epoch:
                raise StaleCoordinator
            self._knowledge.learned(update)

    def _staged(self, head: Head, arrived: ReceivedReply) -> ReceivedReply:
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
