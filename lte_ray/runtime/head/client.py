"""A head process's way to the coordinator: contributions up, replies back, and what is needed if the coordinator dies.

`ReconnectingStub` calls the coordinator, and the next one if it dies. `RecoveryCache` keeps what a new coordinator needs to
know from this process. `CoordinatorClient` sends contributions and fetches what the replies refer to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

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

T = TypeVar("T")

RETRY_SECONDS = 0.5
"""Seconds after which a call is repeated if the coordinator can't be reached for the moment."""


class StaleCoordinator(Exception):
    """The coordinator that gave a reply has died since: the reply is void."""


class ReconnectingStub:
    """Calls the coordinator. While there is none, calls wait for the next one.

    Args:
        coordinator: its handle.
        epoch: how many coordinators there were before it.
    """

    def __init__(self, coordinator: Any, epoch: int) -> None:
        self._coordinator, self.epoch = coordinator, epoch
        self._changed = threading.Condition()
        self._waiting_since: float | None = None

    def connect(self, coordinator: Any, epoch: int) -> None:
        """Calls another coordinator from now on."""
        with self._changed:
            self._coordinator, self.epoch = coordinator, epoch
            self._changed.notify_all()

    def disconnect(self, epoch: int) -> None:
        """Makes replies of coordinators before `epoch` void, and calls wait for the coordinator of that epoch."""
        with self._changed:
            if epoch > self.epoch:
                self._coordinator, self.epoch = None, epoch

    @property
    def seconds_waiting(self) -> float:
        """For how long calls have been waiting for a coordinator that can be reached; 0 if none waits."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def call(self, method: str, *args: Any) -> tuple[int, Any]:
        """Calls a method of the coordinator, as often as it takes; the coordinator recognizes repeated calls.

        Returns:
            The epoch of the coordinator that replied, and its reply.

        Raises:
            LTEError: the coordinator has failed for good.
        """
        while True:
            with self._changed:
                while self._coordinator is None:
                    self._waiting_since = self._waiting_since or time.monotonic()
                    self._changed.wait()
                coordinator, epoch = self._coordinator, self.epoch
            try:
                reply = ray.get(getattr(coordinator, method).remote(*args))
                self._waiting_since = None
                return epoch, reply
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
"""The report of a head that hasn't started."""


@dataclass
class _OwnHead:
    """What is cached of a head of this process.

    Attributes:
        factors: its factors by the sequence number of the contribution that they belong to; None where B' = 0.
        pending: the sequence number of the contribution without a result; None if there is none.
        directed: the furthest that directives which reached this process have gone, even if the head hasn't taken them yet.
    """

    factors: dict[int, Tensor | None] = field(default_factory=dict)
    pending: int | None = None
    directed: HeadReport = NOT_STARTED


class RecoveryCache:
    """Keeps the newest version that reached this process, its positions, and this process's contributions to or after it.

    It doesn't ask the heads: they train meanwhile, and adopt a version later than it arrives. Its caller locks it.

    Args:
        plans: of the heads of this process, by number.
        reset: as `LTEConfig.reset`.
    """

    def __init__(self, plans: Mapping[int, Plan], reset: str) -> None:
        self._plans, self._reset = plans, reset
        self._heads = {number: _OwnHead() for number in plans}
        self._version, self._positions, self._assignment_state = -1, dict[int, CommittedPosition](), dict[str, Any]()

    def record_start(self, head: int, sequence: int, factors: Tensor | None) -> None:
        """Records the factors that the base holds of a head as it starts."""
        self._heads[head].factors[sequence] = factors

    def record_contribution(self, head: int, sequence: int, flat: Tensor) -> None:
        """Records a contribution before it is sent; `flat` is what receivers decode."""
        cached = self._heads[head]
        cached.pending = sequence
        cached.factors[sequence] = None if self._reset == "B" else factors_part(self._plans[head], flat)

    def record_reply(self, reply: CoordinatorReply) -> None:
        """Records a reply whose base has been fetched."""
        if reply.result is not None and not reply.result.accepted:
            self._settle(reply.result.head, reply.result.sequence, accepted=False)
        for number in self._heads.keys() & reply.directives.keys():
            head, directive = self._heads[number], reply.directives[number]
            before = head.directed
            assignment_id = max([before.assignment_id, *(assignment.id for assignment in directive.assignments)])
            revocation_id = max(before.revocation_id, directive.revocation)
            head.directed = HeadReport(-1, max(before.limit, directive.limit), assignment_id, revocation_id)
        if reply.version <= self._version:
            return
        self._version, self._positions, self._assignment_state = reply.version, reply.positions, reply.assignment_state
        for number in self._heads:
            if number in reply.positions:
                self._settle(number, reply.positions[number].sequence, accepted=True)

    def _settle(self, head: int, sequence: int, accepted: bool) -> None:
        """Keeps the factors of this contribution only if it was accepted, else all others."""
        cached = self._heads[head]
        if cached.pending == sequence:
            cached.pending = None
            cached.factors = {s: f for s, f in cached.factors.items() if (s == sequence) == accepted}

    def build_report(
        self,
        base: Tensor | None,
        momentum: Tensor | None,
        progress: Mapping[int, HeadReport],
        transport: Transport,
    ) -> RecoveryReport:
        """Builds the report for a new coordinator, with tensors published.

        Args:
            base: the newest that reached this process; None if none has.
            momentum: of that base, as far as this process knows it; None if it knows none.
            progress: of the heads that have started, without factors.
            transport: publishes the tensors.
        """
        heads = {}
        for number, head in self._heads.items():
            factors = {s: None if f is None else transport.publish(f) for s, f in head.factors.items()}
            now, directed = progress.get(number, NOT_STARTED), head.directed
            heads[number] = HeadReport(
                now.step,
                max(now.limit, directed.limit),
                max(now.assignment_id, directed.assignment_id),
                max(now.revocation_id, directed.revocation_id),
                factors,
            )
        published = [None if flat is None else transport.publish(flat) for flat in (base, momentum)]
        return RecoveryReport(
            self._version, published[0], self._positions, self._assignment_state, heads, momentum=published[1]
        )


@dataclass(frozen=True)
class ReceivedReply:
    """A reply, and what was fetched for it.

    Attributes:
        reply: the coordinator's.
        base: flat; None if this process has that version already.
        accepted: whether `staged` assumes that the outstanding contribution is in the base.
        staged: what `Head.stage` returned for the base, if the process has one head.
    """

    reply: CoordinatorReply
    base: Tensor | None
    accepted: bool = False
    staged: dict[str, Tensor] = field(default_factory=dict)


class CoordinatorClient:
    """Connects the heads of one process with the coordinator.

    Args:
        context: the run's.
        plans: all heads'.
        numbers: of the heads of this process.
        stub: calls the coordinator.
        overlap: whether contributions are encoded and sent while the heads train.

    Attributes:
        base_replica: this process's copy of the base.
        bytes_up: bytes of contributions, by head.
    """

    def __init__(
        self, context: RunContext, plans: Sequence[Plan], numbers: Sequence[int], stub: ReconnectingStub, overlap: bool
    ) -> None:
        merge, reset = context.settings.merge, context.settings.lte.reset
        self._transport, self._stub, self._numbers, self._overlap = context.transport, stub, tuple(numbers), overlap
        self._codecs = [Codec(plan, context.groups, merge) for plan in plans]
        threads = context.merge_threads(plans[0], plans[0])
        self.base_replica = BaseReplica(self._codecs, reset, context.transport.fetch, numbers, threads)
        self.bytes_up = dict.fromkeys(numbers, 0)
        self._recovery_cache = RecoveryCache({number: plans[number] for number in numbers}, reset)
        # Held while a reply or contribution is recorded, and while a coordinator's replies become void. Where the replica's
        # lock is taken too, that comes first.
        self._epoch_lock = threading.Lock()
        self._calls = ThreadPoolExecutor(len(numbers) + 1, "calls")
        self._background = ThreadPoolExecutor(1, "background")  # the threads of `_calls` may all be waiting for replies
        self._in_flight: dict[Future[ReceivedReply], int] = {}  # and the head whose contribution it is
        self._newer_base: Future[ReceivedReply] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._weights_swapped: torch.cuda.Event | None = None

    def join(self, plans: Mapping[int, Plan], incarnation: int, moved: bool = False) -> ReceivedReply:
        """Joins the run; returns the base to start from.

        Args:
            plans: those of the models that were built here.
            incarnation: how often these heads were started before.
            moved: whether they continue on this node what they did on another.
        """
        while True:
            epoch, reply = self._stub.call("join", plans, incarnation, moved)
            try:
                return self._fetch(reply, epoch)
            except StaleCoordinator:
                continue

    def record_start(self, head: Head) -> None:
        """Records that a head has started."""
        state = head.state
        with self._epoch_lock:
            self._recovery_cache.record_start(head.number, state.merged.sequence, state.reference)

    def leave(self, head: int) -> None:
        """Tells the coordinator that a head has ended."""
        self._stub.call("leave", head)

    def call_coordinator(self, method: str, *args: Any) -> None:
        """Calls a method of the coordinator; waits for its reply and drops it."""
        self._stub.call(method, *args)

    def run_in_background(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` in another thread, one at a time."""
        return self._background.submit(work)

    def build_report(self, progress: Mapping[int, HeadReport], epoch: int) -> RecoveryReport:
        """Builds the report for the coordinator of `epoch`; replies of earlier coordinators are void from now on."""
        with self._epoch_lock:
            self._stub.disconnect(epoch)
        return self.base_replica.read(lambda base, momentum: self._build_report(base, momentum, progress))

    def _build_report(self, base: Tensor | None, momentum: Tensor | None, progress: Mapping[int, HeadReport]) -> RecoveryReport:
        with self._epoch_lock:
            return self._recovery_cache.build_report(base, momentum, progress, self._transport)

    # -- contributions and replies ---------------------------------------------------------------------------------------

    def send(self, head: Head, contribution: Contribution) -> None:
        """Sends a contribution, and fetches what the reply refers to, in another thread.

        With `overlap` the contribution is encoded and published there too.
        """
        if not self._overlap:
            sent = self._publish(head, contribution)
            self._in_flight[self._calls.submit(self._submit, head, sent)] = head.number
            return
        ready = torch.cuda.Event() if head.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record(torch.cuda.current_stream(head.device))
        self._in_flight[self._calls.submit(self._publish_and_submit, head, contribution, ready)] = head.number

    def awaits_reply(self, head: Head) -> bool:
        """Whether the reply to this head's last contribution is still to come, even if the result is known already."""
        return head.number in self._in_flight.values()

    def request_newer_base(self, head: Head, version: int) -> None:
        """Requests a base newer than `version` as soon as there is one; does nothing if one is requested already."""
        if self._newer_base is None:
            self._newer_base = self._calls.submit(self._wait_for_newer_base, head, version)

    def received_replies(self, timeout: float = 0) -> list[ReceivedReply]:
        """The replies since the last call, by version; waits up to `timeout` seconds if there is none."""
        waiting = {*self._in_flight, *([self._newer_base] if self._newer_base else [])}
        done, _ = wait(waiting, timeout, FIRST_COMPLETED) if waiting else (set(), None)
        for future in done:
            self._in_flight.pop(future, None)
        if self._newer_base in done:
            self._newer_base = None
        return sorted((future.result() for future in done), key=lambda received: received.reply.version)

    def release_base(self, head: Head) -> None:
        """Says that the base that was received last isn't needed any more."""
        if head.device.type == "cuda":
            self._weights_swapped = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._weights_swapped.record(torch.cuda.current_stream(head.device))
        self.base_replica.release()

    def _publish(self, head: Head, contribution: Contribution) -> Contribution:
        """Encodes a contribution and publishes its buffers; returns the message to send."""
        encoded = head.encode(contribution, self._codecs[head.number])
        self.bytes_up[head.number] += sum(buffer.nbytes for buffer in encoded.buffer)
        sent = replace(
            encoded,
            checksums=tuple(buffers_checksum([b]) for b in encoded.buffer),
            buffer=tuple(map(self._transport.publish, encoded.buffer)),
        )
        assert head.state.pending is not None
        with self._epoch_lock:
            self._recovery_cache.record_contribution(head.number, sent.sequence, head.state.pending)
        return sent

    def _publish_and_submit(self, head: Head, contribution: Contribution, ready: Any) -> ReceivedReply:
        if ready is None:
            return self._submit(head, self._publish(head, contribution))
        stream = self._side_stream(head)
        with torch.cuda.stream(stream):  # so that copying to the CPU doesn't wait for the steps that follow
            stream.wait_event(ready)
            sent = self._publish(head, contribution)
        return self._submit(head, sent)

    def _submit(self, head: Head, sent: Contribution) -> ReceivedReply:
        """Sends a contribution to the coordinator, and to the next one if that dies; returns the reply."""
        while True:
            inject("sent", head=sent.head, step=sent.step)
            epoch, reply = self._stub.call("submit", sent, self._numbers, self.base_replica.redo_from)
            inject("answered", head=sent.head, step=sent.step)
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
        """Fetches what a reply refers to. If the result has a base, `release_base` must follow.

        Raises:
            StaleCoordinator: the coordinator that sent it has died, and what it merged is void.
        """
        while True:
            try:
                base = self.base_replica.acquire(reply, partial(self._record_reply, reply, epoch))
            except (CannotRedoMerges, ObjectLost):
                if self._stub.epoch != epoch:
                    raise StaleCoordinator from None
                newest_epoch, complete = self._stub.call("wait_for_version", self._numbers, -1, -1)  # with the complete base
                if newest_epoch != epoch:
                    raise StaleCoordinator from None
                requests = (*reply.checkpoint_requests, *complete.checkpoint_requests)
                reply = replace(complete, result=reply.result, checkpoint_requests=requests)
            else:
                return ReceivedReply(reply, base)

    def _record_reply(self, reply: CoordinatorReply, epoch: int) -> None:
        with self._epoch_lock:
            if self._stub.epoch != epoch:
                raise StaleCoordinator
            self._recovery_cache.record_reply(reply)

    def _stage(self, head: Head, received: ReceivedReply) -> ReceivedReply:
        """Computes the weights that the head will adopt, so that it stops only to put them in place."""
        if received.base is None or len(self._numbers) > 1 or not self._overlap:
            return received
        accepted = head.outstanding and received.reply.includes(head.number, head.sequence)
        if head.device.type != "cuda":
            return replace(received, accepted=accepted, staged=head.stage(received.base, accepted))
        stream = self._side_stream(head)
        with torch.cuda.stream(stream):
            if self._weights_swapped is not None:  # kernels queued before that may read the weights that are written to here
                stream.wait_event(self._weights_swapped)
            staged = head.stage(received.base, accepted)
            stream.synchronize()
        return replace(received, accepted=accepted, staged=staged)

    def _side_stream(self, head: Head) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream(head.device)  # type: ignore[no-untyped-call]
        return self._stream
