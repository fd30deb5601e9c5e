"""The coordinator's process in the chaos world: the real engine, and what `runtime.coordinator` does around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.merging.registry import make_policy
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult, CoordinatorReply, JoinReply
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.account import Account, InvariantBroken
from tests.chaos.checkpoints import ChaosCheckpoints
from tests.chaos.client import PendingJoin, Submission
from tests.chaos.parts import Call, Disk, Mode, StoredCheckpoint, copy_reply


@dataclass
class ChaosCoordinator(ChaosCheckpoints):
    """One coordinator, from its start to its death.

    Args:
        mode, settings, initial: of the run.
        start: the state that it starts from.
        account: records every merge.
        disk: stores checkpoints.
    """

    mode: Mode
    settings: Settings
    initial: Initial
    start: CoordinatorState
    account: Account
    disk: Disk
    undecided: dict[int, Submission] = field(default_factory=dict)
    arriving: dict[int, Submission] = field(default_factory=dict)
    decided: list[tuple[Call, ContributionResult]] = field(default_factory=list)
    waiting_calls: list[Call] = field(default_factory=list)
    joins: list[PendingJoin] = field(default_factory=list)
    checkpoints: dict[int, StoredCheckpoint] = field(default_factory=dict)
    begins_at_next_merge: bool = False

    def __post_init__(self) -> None:
        start, plans = self.start, self.initial.plans
        self.engine = Coordinator(
            self.settings,
            plans[0],
            start.base.clone(),
            make_policy(self.settings.merge),
            plans=plans,
            version=start.version,
            references={head: factors.clone() for head, factors in start.references.items()},
            momentum=None if start.momentum is None else start.momentum.clone(),
            taken=start.steps_by_head,
            granted=start.step_limits,
            positions=start.positions,
            members=start.members,
            assignor=PartitionAssignor.from_state(start.assignment_state) if start.assignment_state else None,
            clock=lambda: 0.0,
        )
        if start.outlier_filter:
            self.engine.load_outlier_state(start.outlier_filter)
        if start.checkpoint_version is not None and self.disk.checkpoints[start.checkpoint_version].policy:
            self.engine.load_policy_state(self.disk.checkpoints[start.checkpoint_version].policy)
        self.joined: set[int] = set()
        self.together = start.epoch == 0 and (self.engine.shares_steps or bool(start.exact_heads))
        self.exact = set(start.exact_heads) if start.epoch == 0 else set[int]()
        self.reachable_heads = set(start.step_limits)
        self.newest, self.heads_saved = start.checkpoint_version, start.saved_heads
        self._published: dict[int, tuple[dict[int, CommittedPosition], dict[str, Any]]] = {}

    # -- contributions ---------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """A contribution arrives; `SubmissionLoop.submit` until it is fetched."""
        c: Contribution = call.payload
        key = (c.incarnation, c.sequence)
        for here in (self.arriving.get(c.head), self.undecided.get(c.head)):
            if here is not None and (here.contribution.incarnation, here.contribution.sequence) == key:
                here.calls.append(call)
                return
        settled = self.engine.merged_result(c)
        if settled is not None:
            self.decided.append((call, settled))
            return
        submission = Submission(c, [call], call.process.track)
        refusal = self.engine.refuse_by_numbers(c)
        if refusal is not None:
            self._handle(lambda: refusal, submission)
        else:
            self.arriving[c.head] = submission

    def receive(self, head: int) -> None:
        """The contribution that was being fetched is complete: the engine receives it."""
        submission = self.arriving.pop(head)
        self._handle(lambda: self.engine.receive(submission.contribution, submission.contribution.buffer), submission)

    def _handle(self, event: Callable[[], EventResult], submission: Submission | None = None) -> None:
        """Gives the engine an event, and its results to the calls that wait for them; `SubmissionLoop.handle`."""
        event_result = event()
        results = list(event_result.results)
        if submission is not None:
            refused = event_result.refusal(submission.contribution)
            if refused is None:
                self.undecided[submission.contribution.head] = submission
            else:
                results.remove(refused)
                self.decided += [(call, refused) for call in submission.calls]
                if "its own" in refused.reason:
                    raise InvariantBroken(refused.reason)
        decided = [(result, self.undecided.pop(result.head)) for result in results]
        tracks = {result.head: each.track for result, each in decided}
        if self.undecided.keys() != set(self.engine.pending_heads):
            raise InvariantBroken(
                f"heads {sorted(self.undecided)} wait for a result, but those of {self.engine.pending_heads} are to be decided"
            )
        for merge in event_result.merges:
            self.account.merge(merge, tracks, len(self.engine.members))
        if event_result.merges and self.begins_at_next_merge and self.may_begin:
            self.begin_checkpoint()
        for result, each in decided:
            self.decided += [(call, result) for call in each.calls]

    def leave(self, head: int) -> None:
        self._handle(lambda: self.engine.leave(head))

    def lose(self, head: int, drop: bool) -> None:
        """A head's process is gone; `CoordinatorActor.lose`."""
        self.reachable_heads.discard(head)
        self.joins = [join for join in self.joins if join.call.process.number != head]
        self._handle(lambda: (self.engine.drop if drop else self.engine.lose)(head))
        for version in list(self.checkpoints):
            self.add_part(version, head, None)

    # -- answers ---------------------------------------------------------------------------------------------------

    def reply_to(self, index: int) -> None:
        """Replies to a contribution that is decided, with what is the newest now."""
        call, result = self.decided.pop(index)
        self._send(call, replace(self.reply(call.process.number), result=result))

    def reply_to_waiting(self) -> None:
        """Replies to the calls that waited for a version that exists now."""
        for call in [call for call in self.waiting_calls if call.payload < self.engine.version]:
            self.waiting_calls.remove(call)
            self._send(call, self.reply(call.process.number))

    def reply(self, head: int) -> CoordinatorReply:
        """Returns a reply for a head, without a result; `Broadcaster.reply`, with whole bases."""
        engine = self.engine
        known = (dict(engine.positions), engine.assignment_state())
        if self.mode.cached:
            known = self._published.setdefault(engine.version, known)
        opened = [c for c in self.checkpoints.values() if head in c.missing - c.asked_in_reply - c.asked_by_driver]
        for each in opened:
            each.asked_in_reply.add(head)
        momentum = self.momentum() if self.mode.redo else None
        return CoordinatorReply(
            None,
            engine.version,
            {0: engine.base.clone()},
            momentum={} if momentum is None else {0: momentum},
            positions=known[0],
            assignment_state=known[1],
            checkpoint_requests=tuple(each.request for each in opened),
            directives={head: engine.next_directive(head)},
        )

    def _send(self, call: Call, update: CoordinatorReply) -> None:
        if call.process.alive and call in call.process.calls:
            call.answers.append((self.start.epoch, copy_reply(update)))

    def continue_join(self, join: PendingJoin) -> bool:
        """Continues a call of `CoordinatorActor.join` as far as it can go now. Returns whether it got further."""
        head, incarnation, engine = join.call.process.number, join.call.process.incarnation, self.engine
        if join.stage == "asked":
            if head in engine.pending_heads:
                return False
            anew = incarnation > 0 and join.call.process.moved is None
            engine.join(head, incarnation, fresh=anew and self.mode.rejoin == "fresh")
            self.joined.add(head)
            join.stage = "joined"
            return True
        if (self.together and not self.joined >= engine.live) or not engine.has_data(head):
            return False
        if join.reply is not None:
            if self.exact & engine.live:
                return False
            self.joins.remove(join)
            self._send(join.call, join.reply)
            return True
        self.together = False
        exact = incarnation == 0 and self.start.epoch == 0 and head in self.start.exact_heads
        if exact and engine.version == self.start.version:
            join_reply = JoinReply(engine.positions[head], checkpoint=self.start.checkpoint_version, exact=True)
        else:
            position = engine.start_head(head)
            reference = engine.reference(head) if position.sequence else None
            join_reply = JoinReply(
                position, None if reference is None else reference.clone(), self.newest if head in self.heads_saved else None
            )
        self.reachable_heads.add(head)
        join.reply = replace(self.reply(head), join_replies={head: join_reply})
        self.exact.discard(head)
        return True
