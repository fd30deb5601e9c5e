"""How a head's process in the chaos world calls the coordinator: what `runtime.head.client` does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lte_ray.engine.head.head import Head
from lte_ray.messages import Contribution, CoordinatorReply, HeadReport, RecoveryReport
from lte_ray.runtime.head.client import RecoveryCache
from tests.chaos.account import Track
from tests.chaos.parts import Call, LocalTransport


@dataclass
class Received:
    """A reply that was received, and its base if that is newer than what the process had."""

    reply: CoordinatorReply
    base: Tensor | None


@dataclass(eq=False)
class Submission:
    """A contribution that the coordinator has, and the calls that wait for its result."""

    contribution: Contribution
    calls: list[Call]
    track: Track


@dataclass(eq=False)
class PendingJoin:
    """A call of `join` in progress: `stage` is "asked", then "joined"; at last its `reply` is ready."""

    call: Call
    stage: str = "asked"
    reply: CoordinatorReply | None = None


class ChaosClient:
    """Calls that are made until they are answered, and what the process knows of the run.

    Attributes:
        epoch: of the newest coordinator; replies of earlier ones don't count.
        version, base, momentum: the newest that arrived, adopted or not.
        received: replies that the head hasn't adopted yet.
    """

    number: int
    epoch: int
    head: Head | None
    recovery_cache: RecoveryCache
    version: int
    base: Tensor | None
    momentum: Tensor | None
    received: list[Received]
    calls: list[Call]
    _watching: bool

    def call(self, kind: str, payload: object = None) -> None:
        self.calls.append(Call(self, kind, payload))

    def awaits_result(self) -> bool:
        """Whether the reply to its contribution is still to come."""
        return any(call.kind == "submit" for call in self.calls)

    def fetch(self, call: Call) -> bool:
        """Receives the first reply to a call, unless another base isn't adopted yet; `CoordinatorClient._receive`."""
        epoch, reply = call.answers[0]
        if epoch != self.epoch:  # its coordinator is gone: the call is made again
            call.answers.clear()
            call.place = "wire"
            return True
        if any(received.base is not None for received in self.received):
            return False  # the base replica is in use
        base = reply.base_parts[0] if reply.version > self.version else None
        self.recovery_cache.record_reply(reply)
        if base is not None:
            self.version, self.base, self.momentum = reply.version, base, reply.momentum.get(0)
        self.calls.remove(call)
        self.received.append(Received(reply, base))
        if call.kind == "newer":
            self._watching = False
        return True

    def report(self, epoch: int) -> RecoveryReport:
        """Returns what it knows. From now on replies of earlier coordinators don't count; `HeadActor.report`."""
        self.epoch = epoch
        head, positions = self.head, dict[int, HeadReport]()
        if head is not None:
            released = head.batch_stream.revoked
            positions[self.number] = HeadReport(
                head.step, head.step_limit, head.batch_stream.assignment_id, released.id if released else 0
            )
        return self.recovery_cache.build_report(self.base, self.momentum, positions, LocalTransport())

    def resend(self) -> None:
        """The coordinator is gone: calls that it had are made again."""
        for call in self.calls:
            if call.place == "held":
                call.place = "wire"
