"""A head's process in the chaos world towards the coordinator: what `runtime.courier` and `runtime.line` do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lte_ray.engine.head.head import Head
from lte_ray.messages import Contribution, CoordinatorReply, HeadReport, RecoveryReport
from lte_ray.runtime.head.client import RecoveryCache
from tests.chaos.account import Track
from tests.chaos.parts import Call, Here


@dataclass
class Arrived:
    """An update that was fetched, and its base where that is newer than what the process had."""

    update: CoordinatorReply
    base: Tensor | None


@dataclass(eq=False)
class Submission:
    """A contribution that is here, and the calls that wait to hear of it."""

    contribution: Contribution
    calls: list[Call]
    track: Track


@dataclass(eq=False)
class Joining:
    """A call of `join`, and how far it has come: `asked`, then `joined`; then its `answer` is there."""

    call: Call
    stage: str = "asked"
    answer: CoordinatorReply | None = None


class Line:
    """Calls that are made until they are answered, and what is known of the run (`Process`).

    Attributes:
        epoch: of the coordinator that counts; answers of earlier ones don't.
        version, base: the newest that came here, adopted or not.
        arrived: updates that the head has yet to take.
    """

    number: int
    epoch: int
    head: Head | None
    knowledge: RecoveryCache
    version: int
    base: Tensor | None
    arrived: list[Arrived]
    calls: list[Call]
    _watching: bool

    def call(self, kind: str, payload: object = None) -> None:
        self.calls.append(Call(self, kind, payload))

    def carries(self) -> bool:
        """Whether the answer to its contribution is still to come."""
        return any(call.kind == "submit" for call in self.calls)

    def fetch(self, call: Call) -> bool:
        """Takes the first answer to a call, unless one is here that isn't adopted yet; `CoordinatorClient._take`."""
        epoch, update = call.answers[0]
        if epoch != self.epoch:  # Cut: what it says doesn't count, so the call is made again
            call.answers.clear()
            call.place = "wire"
            return True
        if any(arrived.base is not None for arrived in self.arrived):
            return False  # the mirror is taken
        base = update.base_parts[0] if update.version > self.version else None
        self.knowledge.record_reply(update)
        if base is not None:
            self.version, self.base = update.version, base
        self.calls.remove(call)
        self.arrived.append(Arrived(update, base))
        if call.kind == "newer":
            self._watching = False
        return True

    def report(self, epoch: int) -> RecoveryReport:
        """What it knows; earlier coordinators' answers don't count any more; `HeadActor.report`."""
        self.epoch = epoch
        head, positions = self.head, dict[int, HeadReport]()
        if head is not None:
            released = head.batch_stream.revoked
            positions[self.number] = HeadReport(
                head.step, head.step_limit, head.batch_stream.assignment_id, released.id if released else 0
            )
        return self.knowledge.build_report(self.base, positions, Here())

    def cut(self) -> None:
        """The coordinator is gone: calls that were there are made again."""
        for call in self.calls:
            if call.place == "held":
                call.place = "wire"
