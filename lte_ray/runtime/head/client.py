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
from lte_ray.runtime.ray_errors import PROCESS_DIED
from lte_ray.transfer.checksum import buffers_checksum
from lte_ray.transfer.codec import Codec

RETRY_SECONDS = 0.5
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
        self._waiting_since: float | None = None

    def connect(self, coordinator: Any, epoch: int) -> None:
        """Another coordinator answers from now on."""
        with self._changed:
            self._coordinator, self.epoch = coordinator, epoch
            self._changed.notify_all()

    def disconnect(self, epoch: int) -> None:
        """Answers of coordinators before `epoch` don't count any more, and calls wait for that one."""
        with self._changed:
            if epoch > self.epoch:
                self._coordinator, self.epoch = None, epoch

    @property
    def seconds_waiting(self) -> float:
        """For how many seconds calls have been waiting for a coordinator that can be reached; 0 if none is."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def call(self, method: str, *args: Any) -> tuple[int, Any]:
        """What the coordinator answers, and which one it was. As often as it takes: it knows repeats.

        Raises:
            LTEError: it has failed for good.
        """
        while True:
            with self._changed:
                while self._coordinator is None:
                    self._waiting_since = self._waiting_since or time.monotonic()
                    self._changed.wait()
                coordinator, epoch = self._coordinator, self.epoch
            try:
                answer = ray.get(getattr(coordinator, method).remote(*args))
                self._waiting_since = None
                return epoch, answer
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, CoordinatorLost | ObjectLost):  # one of its shards, or what it was to fetch, is gone
                    self._forget_coordinator(epoch)
                    continue
                raise (error.cause if isinstance(error.cause, LTEError) else error) from None
            except PROCESS_DIED as error:
                if isinstance(error, ray.exceptions.ActorUnavailableError):
                    with self._changed:
                        self._waiting_since = self._waiting_since or time.monotonic()
                        self._changed.wait(RETRY_SECONDS)
                else:
                    self._forget_coordinator(epoch)

    def _forget_coordinator(self, epoch: int) -> None:
        with self._changed:
            self._waiting_since = self._waiting_since or time.monotonic()
            if self.epoch == epoch:
                self._coordinator = None


NOT_STARTED = HeadReport(-1, 0)
"""Of a head that hasn't begun."""


@dataclass
class _OwnHead:
    """Of a head here: its factors by the contribution that they follow (None where B' = 0), and what isn't answered yet.

    `ordered` is what orders say that came here, whether the head has taken them or is about to.
    """

    factors: dict[int, Tensor | None] = field(default_factory=dict)
    outstanding: Contribution | None = None
    directed: HeadReport = NOT_STARTED


class RecoveryCache:
    """Keeps, beside training, the newest version that came here with what it holds, and this process's own contributions.

    Args:
        plans: all heads'.
        numbers: of the heads here.
        reset: as `LTEConfig.reset`.
    """

    def __init__(self, plans: Mapping[int, Plan], reset: str) -> None:
        self._plans, self._reset = plans, reset
        self._heads = {number: _OwnHead() for number in plans}
        self.version, self.held, self.ledger = -1, dict[int, CommittedPosition](), dict[str, Any]()

    def record_start(self, head: int, sequence: int, factors: Tensor | None) -> None:
        """A head here starts with these factors in the base."""
        self._heads[head].factors[sequence] = factors

    def record_contribution(self, contribution: Contribution, flat: Tensor) -> None:
        """A head here sends a contribution; `flat` is what receivers make of it."""
        own, plan = self._heads[contribution.head], self._plans[contribution.head]
        own.outstanding = contribution
        own.factors[contribution.sequence] = None if self._reset == "B" else factors_part(plan, flat)

    def record_reply(self, reply: CoordinatorReply) -> None:
        """An update has come, and its base is here."""
        if reply.result is not None and not reply.result.accepted:
            self._settle(reply.result.head, reply.result.sequence, accepted=False)
        for head in self._heads.keys() & reply.directives.keys():
            own, order = self._heads[head], reply.directives[head]
            grant = max([own.directed.assignment_id, *(grant.id for grant in order.assignments)])
            released = max(own.directed.revoked, order.revocation)
            own.directed = HeadReport(-1, max(own.directed.limit, order.limit), grant, released)
        if reply.version <= self.version:
            return
        self.version, self.held, self.ledger = reply.version, reply.positions, reply.assignment_state
        for head in self._heads:
            if head in reply.positions:
                self._settle(head, reply.positions[head].sequence, accepted=True)

    def _settle(self, head: int, sequence: int, accepted: bool) -> None:
        own = self._heads[head]
        if own.outstanding is None or own.outstanding.sequence != sequence:
            return
        own.outstanding = None
        own.factors = {s: f for s, f in own.factors.items() if (s == sequence) == accepted}

    def build_report(self, base: Tensor | None, positions: Mapping[int, HeadReport], transport: Transport) -> RecoveryReport:
        """All of it, published; `positions` are those of the heads that have begun."""
        heads = {}
        for head, own in self._heads.items():
            known = {s: None if f is None else transport.publish(f) for s, f in own.factors.items()}
            at, said = positions.get(head, NOT_STARTED), own.directed
            limit, grant, released = (max(getattr(at, f), getattr(said, f)) for f in ("limit", "assignment_id", "revoked"))
            heads[head] = HeadReport(at.step, limit, grant, released, known)
        return RecoveryReport(self.version, None if base is None else transport.publish(base), self.held, self.ledger, heads)


@dataclass(frozen=True)
class ReceivedReply:
    """An update that has come, and the base that it led to (flat), if that is newer than what this process had.

    `staged` is what the process's only head makes of that base (`Head.stage`), with its contribution or without (`accepted`).
    """

    reply: CoordinatorReply
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
        self, context: RunContext, plans: Sequence[Plan], numbers: Sequence[int], stub: ReconnectingStub, overlap: bool
    ) -> None:
        merge = context.settings.merge
        self._transport, self._stub, self._numbers, self._overlap = context.transport, stub, tuple(numbers), overlap
        self._codecs = [Codec(plan, context.groups, merge) for plan in plans]
        self.base_replica = BaseReplica(
            self._codecs,
            context.settings.lte.reset,
            context.transport.fetch,
            numbers,
            context.merge_threads(plans[0], plans[0]),
        )
        self._recovery_cache = RecoveryCache({number: plans[number] for number in numbers}, context.settings.lte.reset)
        self._epoch_lock = threading.Lock()  # between what comes from a coordinator and the end of its time
        self.bytes_up = dict.fromkeys(numbers, 0)
        self._pool = ThreadPoolExecutor(len(numbers) + 1, "courier")
        self._background = ThreadPoolExecutor(1, "aside")  # the others may be waiting for answers
        self._in_flight: dict[Future[ReceivedReply], int] = {}  # by whose head
        self._newer_base: Future[ReceivedReply] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._weights_swapped: torch.cuda.Event | None = None

    def join(self, plans: Mapping[int, Plan], incarnation: int) -> ReceivedReply:
        """The base to start from; `plans` are those of the models that were built here."""
        while True:
            epoch, reply = self._stub.call("join", plans, incarnation)
            try:
                return self._fetch(reply, epoch)
            except StaleCoordinator:
                continue

    def record_start(self, head: Head, reference: Tensor | None) -> None:
        """A head here has started with this reference."""
        self._recovery_cache.record_start(head.number, head.state.merged.sequence, reference)

    def leave(self, head: int) -> None:
        """A head has ended."""
        self._stub.call("leave", head)

    def release_base(self, head: Head) -> None:
        """The base that came last isn't needed any more."""
        if head.device.type == "cuda":
            self._weights_swapped = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._weights_swapped.record(torch.cuda.current_stream(head.device))
        self.base_replica.release()

    def report(self, positions: Mapping[int, HeadReport], epoch: int) -> RecoveryReport:
        """What this process knows, for the coordinator of that number; what earlier ones have sent doesn't count any more."""
        with self._epoch_lock:
            self._stub.disconnect(epoch)
        return self.base_replica.read(lambda base: self._report(base, positions))

    def _report(self, base: Tensor | None, positions: Mapping[int, HeadReport]) -> RecoveryReport:
        with self._epoch_lock:  # always after the mirror's own lock
            return self._recovery_cache.build_report(base, positions, self._transport)

    # -- contributions and answers -----------------------------------------------------------------------------------

    def send(self, head: Head, contribution: Contribution) -> None:
        """Sends a contribution and fetches what the answer leads to; in another thread, what needn't keep the head."""
        if not self._overlap:
            encoded = self._publish(head, contribution)
            self._in_flight[self._pool.submit(self._submit, head, encoded)] = head.number
            return
        ready = torch.cuda.Event() if head.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record(torch.cuda.current_stream(head.device))
        self._in_flight[self._pool.submit(self._encode_and_submit, head, contribution, ready)] = head.number

    def awaits_reply(self, head: Head) -> bool:
        """Whether the answer to this head's last contribution is still to come, even if its verdict is known by another."""
        return head.number in self._in_flight.values()

    def request_newer_base(self, head: Head, version: int) -> None:
        """Asks to be told of a version newer than `version`, whatever becomes of contributions; one question at a time."""
        if self._newer_base is None:
            self._newer_base = self._pool.submit(self._wait_for_newer_base, head, version)

    def run_in_background(self, work: Callable[[], None]) -> None:
        """Does something in another thread."""
        self._background.submit(work)

    def call_coordinator(self, method: str, *args: Any) -> None:
        """Tells the coordinator something."""
        self._stub.call(method, *args)

    def received_replies(self, timeout: float = 0) -> list[ReceivedReply]:
        """What has come since the last call, after up to `patience` seconds if there is nothing."""
        waiting = {*self._in_flight, *([self._newer_base] if self._newer_base else [])}
        done, _ = wait(waiting, timeout, FIRST_COMPLETED) if waiting else (set(), None)
        for future in done:
            self._in_flight.pop(future, None)
        if self._newer_base in done:
            self._newer_base = None
        return sorted((future.result() for future in done), key=lambda arrived: arrived.reply.version)

    def _publish(self, head: Head, contribution: Contribution) -> Contribution:
        encoded = head.encode(contribution, self._codecs[head.number])
        self.bytes_up[head.number] += sum(buffer.nbytes for buffer in encoded.buffer)
        sent = replace(
            encoded,
            checksums=tuple(buffers_checksum([b]) for b in encoded.buffer),
            buffer=tuple(map(self._transport.publish, encoded.buffer)),
        )
        assert head.state.pending is not None
        with self._epoch_lock:
            self._recovery_cache.record_contribution(sent, head.state.pending)
        return sent

    def _encode_and_submit(self, head: Head, contribution: Contribution, ready: Any) -> ReceivedReply:
        if ready is None:
            return self._submit(head, self._publish(head, contribution))
        with torch.cuda.stream(self._side_stream(head)):  # so that copying out doesn't wait for the steps that follow
            self._side_stream(head).wait_event(ready)
            encoded = self._publish(head, contribution)
        return self._submit(head, encoded)

    def _submit(self, head: Head, encoded: Contribution) -> ReceivedReply:
        """The answer to a contribution, of whatever coordinator is there to give it."""
        while True:
            inject("sent", head=encoded.head, step=encoded.step)
            epoch, reply = self._stub.call("submit", encoded, self._numbers, self.base_replica.redo_from)
            inject("answered", head=encoded.head, step=encoded.step)
            try:
                return self._stage(head, self._fetch(reply, epoch))
            except StaleCoordinator:
                continue

    def _wait_for_newer_base(self, head: Head, version: int) -> ReceivedReply:
        while True:
            epoch, reply = self._stub.call("wait_for_version", self._numbers, version, self.base_replica.redo_from)
            try:
                return self._stage(head, self._fetch(reply, epoch))
            except StaleCoordinator:
                continue

    def _fetch(self, reply: CoordinatorReply, epoch: int) -> ReceivedReply:
        """Fetches what an update leads to. If there is a base, `adopted` has to follow.

        Raises:
            Cut: the coordinator that sent it is gone, and with it what it has merged.
        """
        while True:
            try:
                base = self.base_replica.acquire(reply, partial(self._record_reply, reply, epoch))
            except (CannotRedoMerges, ObjectLost):
                if self._stub.epoch != epoch:
                    raise StaleCoordinator from None
                now, whole = self._stub.call("wait_for_version", self._numbers, -1, -1)
                if now != epoch:
                    raise StaleCoordinator from None
                reply = replace(
                    whole, result=reply.result, checkpoint_requests=(*reply.checkpoint_requests, *whole.checkpoint_requests)
                )
            else:
                return ReceivedReply(reply, base)

    def _record_reply(self, reply: CoordinatorReply, epoch: int) -> None:
        """An update was fetched; if it still counts, it's known from now on."""
        with self._epoch_lock:
            if self._stub.epoch != epoch:
                raise StaleCoordinator
            self._recovery_cache.record_reply(reply)

    def _stage(self, head: Head, received: ReceivedReply) -> ReceivedReply:
        """Computes what the head will adopt, so that it stands still only to put it in place."""
        if received.base is None or len(self._numbers) > 1 or not self._overlap:
            return received
        accepted = head.outstanding and received.reply.includes(head.number, head.sequence)
        if head.device.type != "cuda":
            return replace(received, accepted=accepted, staged=head.stage(received.base, accepted))
        with torch.cuda.stream(self._side_stream(head)):
            if (
                self._weights_swapped is not None
            ):  # until then kernels that were queued before may read the weights to be written to
                self._side_stream(head).wait_event(self._weights_swapped)
            staged = head.stage(received.base, accepted)
            self._side_stream(head).synchronize()
        return replace(received, accepted=accepted, staged=staged)

    def _side_stream(self, head: Head) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream(head.device)  # type: ignore[no-untyped-call]
        return self._stream
