"""A head's process in the chaos world: the real head, and what `runtime.head.actor` does around it, one act at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lte_ray.engine.head.early_end import EarlyEnd
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, StateMissed, rejoin, restore, snapshot
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.messages import CheckpointRequest, ContributionResult, CoordinatorReply
from lte_ray.runtime.head.client import RecoveryCache
from tests.chaos.account import InvariantBroken, Track, assert_close, trained_weights
from tests.chaos.client import ChaosClient, Received
from tests.chaos.parts import Call, HeadPart, LinearFit

if TYPE_CHECKING:
    from tests.chaos.parts import Disk


class ChaosHeadProcess(ChaosClient):
    """One head's process: it builds the head, joins, trains, contributes, adopts and leaves.

    Args:
        settings, initial: of the run.
        number: of its head.
        incarnation: processes that the head had before.
        epoch: of the coordinator that it is connected to.
        disk: has the checkpoints.
        moved: the state that the head's last process has left, if it has moved.
    """

    def __init__(
        self,
        settings: Settings,
        initial: Initial,
        number: int,
        incarnation: int,
        epoch: int,
        disk: Disk,
        moved: SavedState | None = None,
    ) -> None:
        self.settings, self.number, self.incarnation, self.epoch, self.disk = settings, number, incarnation, epoch, disk
        self.alive, self.left, self.quarantined = True, False, False
        self.worker, self.head, self.track = LinearFit(), None, None
        self._initial = initial
        self.recovery_cache = RecoveryCache({number: initial.plans[number]}, settings.lte.reset)
        self.version, self.base, self.momentum = -1, None, None  # the newest that arrived, adopted or not
        self.received: list[Received] = []
        self.calls: list[Call] = [Call(self, "join")]
        self.round_steps = settings.merge.merge_iter
        self._watching = False
        self.early_end, self.moved, self.leaves = EarlyEnd(), moved, None
        self._start_sequence, self._start_incarnation = 0, 0

    track: Track | None
    leaves: SavedState | None
    """The state for its next process, once it leaves."""

    def begin(self) -> None:
        """Starts the head as the reply to `join` says; `HeadCheckpointer.start_head`."""
        (received,) = self.received
        self.received = []
        reply, base = received.reply, received.base
        assert base is not None
        join_reply = reply.join_replies[self.number]
        head = Head(self.worker, self.settings, self.number, dtype=torch.float64, incarnation=self.incarnation)
        part = (
            self.disk.checkpoints[join_reply.checkpoint].parts.get(self.number) if join_reply.checkpoint is not None else None
        )
        saved = (
            self.disk.read_head(None, self.disk.checkpoints[join_reply.checkpoint], self.number) if part is not None else None
        )
        sequence = self._start_sequence = join_reply.position.sequence
        self._start_incarnation = join_reply.position.incarnation
        if join_reply.exact:
            assert saved is not None and part is not None
            restore(head, saved, base)
            self.track = Track(part.unmerged, list(part.slots))
        else:
            saved = self.moved or saved
            rejoin(head, join_reply.position, join_reply.reference, reply.version, base, saved)
            self.track = Track(torch.zeros_like(base), [])
            self._check_untrained(head)
        self.track.at[sequence] = (torch.zeros_like(base), 0)
        self.head = head
        head.interrupted = lambda: self.early_end.interrupts(head)
        self.recovery_cache.record_start(self.number, head.state.merged.sequence, head.state.reference)
        self._apply_directives(reply)

    def _check_untrained(self, head: Head) -> None:
        """A head that has trained nothing must contribute nothing: its factors are the reference, or B = 0."""
        plan, reference = head.plan, head.state.reference
        for spec in plan.adapted:
            if reference is None and bool(head.state.factors[spec.b_name].any()):
                raise InvariantBroken(f"head {self.number} starts without a reference, and B isn't 0")
        if reference is not None:
            parts = [
                head.state.factors[name].detach().reshape(-1) for spec in plan.adapted for name in (spec.a_name, spec.b_name)
            ]
            assert_close(torch.cat(parts), reference, f"head {self.number} starts with other factors than its reference")
        if any(bool(change.any()) for change in head.state.replica_changes().values()):
            raise InvariantBroken(f"head {self.number} starts with replicas that aren't the base's")

    @property
    def over(self) -> bool:
        return self.head is not None and (self.head.finished or self.quarantined or self.early_end.has_left(self.head))

    @property
    def moves(self) -> bool:
        """Whether it has ended only to go on elsewhere."""
        return self.head is not None and self.ended and not self.head.finished and not self.quarantined

    def train(self, steps: int) -> bool:
        """Takes up to `steps` steps. Returns whether it took any."""
        head, merge = self.head, self.settings.merge
        if head is None or self.over or self.ended or self.track is None:
            return False
        if merge.wait and (head.outstanding or self.awaits_result()):
            return False
        steps = min(steps, head.steps_left, max(0, self.round_steps - head.steps_since_contribution) if merge.wait else steps)
        if not steps or not head.batch_stream.partitions:
            return False
        before, slots = trained_weights(head), len(self.worker.trained)
        head.train(steps)
        self.track.step(trained_weights(head) - before, self.worker.trained[slots:])
        return True

    def due(self) -> bool:
        """Whether it must contribute now."""
        head = self.head
        if head is None or self.over or self.ended or head.outstanding or self.awaits_result():
            return False
        due = head.steps_since_contribution >= self.round_steps or (head.steps_left == 0 and not head.finished)
        return due or self.early_end.is_due(head)

    def contribute(self) -> None:
        """Sends a contribution."""
        assert self.head is not None and self.track is not None
        contribution = self.head.contribute()
        self.early_end.record_contribution(self.head)
        self.track.record_contribution(contribution.sequence)
        self.recovery_cache.record_contribution(self.number, contribution.sequence, self.head.state.pending)
        self.call("submit", replace(contribution, buffer=contribution.buffer.clone()))

    def advance(self) -> None:
        """Does what each turn of the loop does: waits for newer versions, and leaves once everything is merged."""
        head = self.head
        if head is None:
            return
        if self.early_end.has_contributed(head) and self.leaves is None and not self.quarantined:
            self._save_to_move(head)
        if self.over and not self.left and not self.awaits_result():
            self.left = True
            self.call("leave")
        if not self.settings.merge.wait and not self._watching and not self.over:
            self._watching = True
            self.call("newer", head.version + self.settings.max_lag)

    def _save_to_move(self, head: Head) -> None:
        """`HeadCheckpointer.save_to_move`."""
        state = head.state
        sequence = state.merged.sequence if state.pending is None else state.sequence
        self.leaves = snapshot(head, CheckpointRequest(head.version, {self.number: sequence}))
        if sequence == self._start_sequence:
            self.leaves[1]["incarnation"] = self._start_incarnation

    @property
    def ended(self) -> bool:
        """Whether its `run` call has returned: everything is merged, and the coordinator knows that it left."""
        return self.over and self.left and not any(call.kind in ("leave", "submit") for call in self.calls)

    def adopt(self) -> None:
        """Adopts what was received, in the order of versions; `HeadActor._adopt_replies`."""
        if self.head is None:
            return
        received, self.received = sorted(self.received, key=lambda each: each.reply.version), []
        for each in received:
            self._adopt_reply(self.head, each)

    def _adopt_reply(self, head: Head, received: Received) -> None:
        reply, base = received.reply, received.base
        for request in reply.checkpoint_requests:
            self._take_snapshot(head, request)
        self._apply_directives(reply)
        result = reply.result
        if result is not None and not result.accepted and head.outstanding and result.sequence == head.sequence:
            head.adopt(result, head.version, None)
            if not result.discarded:
                if result.harmful:
                    assert self.track is not None
                    self.track.drop(head.state.merged.sequence)
                    if not self.finite:
                        raise InvariantBroken(f"head {self.number} has dropped poison, and some is left")
                self.quarantined = self.quarantined or result.quarantined
        if base is not None:
            accepted = head.outstanding and reply.includes(self.number, head.sequence)
            head.adopt(
                ContributionResult(self.number, head.sequence, True, reply.version) if accepted else None, reply.version, base
            )

    def _apply_directives(self, reply: CoordinatorReply) -> None:
        assert self.head is not None
        if not self.left:
            self.head.apply_directive(reply.directives[self.number])
            self.round_steps = reply.directives[self.number].steps

    def _take_snapshot(self, head: Head, request: CheckpointRequest) -> None:
        assert self.track is not None
        if self.number not in request.sequences:
            return
        part: HeadPart | None = None
        try:
            state = snapshot(head, request)
        except StateMissed:
            pass
        else:
            part = HeadPart(*state, *self.track.unmerged(request.sequences[self.number]))
        self.call("saved", (request.version, self.number, part))

    # -- seen from outside -----------------------------------------------------------------------------------------

    @property
    def finite(self) -> bool:
        """Whether its weights are finite, so that no poison is in them."""
        head = self.head
        if head is None:
            return False
        return all(bool(torch.isfinite(p).all()) for p in (*head.state.factors.values(), *head.state.replicas.values()))

    def poison(self) -> None:
        """Makes its next steps give NaN."""
        if self.head is None or self.over:
            return
        with torch.no_grad():
            self.head.state.factors[self.head.plan.adapted[0].b_name].fill_(float("nan"))
