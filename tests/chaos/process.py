"""A head's process in the chaos world: what `runtime.head` and `runtime.courier` do around the real head, one act at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import StateMissed, rejoin, restore, snapshot
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.messages import CheckpointRequest, ContributionResult, CoordinatorReply
from lte_ray.runtime.head.client import RecoveryCache
from tests.chaos.account import Broken, Track, near, trained_weights
from tests.chaos.client import Arrived, Line
from tests.chaos.parts import Call, Fit, Part

if TYPE_CHECKING:
    from tests.chaos.parts import Disk


class Process(Line):
    """One head's process: it builds, joins, trains, contributes, adopts and leaves.

    Args:
        settings, initial: of the run.
        number: of its head.
        incarnation: how many it had before.
        epoch: of the coordinator that it is connected to.
        disk: where checkpoints are.
    """

    def __init__(self, settings: Settings, initial: Initial, number: int, incarnation: int, epoch: int, disk: Disk) -> None:
        self.settings, self.number, self.incarnation, self.epoch, self.disk = settings, number, incarnation, epoch, disk
        self.alive, self.left, self.quarantined = True, False, False
        self.worker, self.head, self.track = Fit(), None, None
        self._initial = initial
        self.knowledge = RecoveryCache({number: initial.plans[number]}, settings.lte.reset)
        self.version, self.base = -1, None  # of the newest that came here, adopted or not
        self.arrived: list[Arrived] = []
        self.calls: list[Call] = [Call(self, "join")]
        self.every = settings.merge.merge_iter
        self._watching = False

    track: Track | None

    def begin(self) -> None:
        """Starts the head as the answer to `join` says; `HeadCheckpointer.begin`."""
        (arrived,) = self.arrived
        self.arrived = []
        update, base = arrived.update, arrived.base
        assert base is not None
        begin = update.join_replies[self.number]
        head = Head(self.worker, self.settings, self.number, dtype=torch.float64, incarnation=self.incarnation)
        part = self.disk.kept[begin.checkpoint].parts.get(self.number) if begin.checkpoint is not None else None
        saved = self.disk.read_head(None, self.disk.kept[begin.checkpoint], self.number) if part is not None else None
        sequence = begin.position.sequence
        if begin.exact:
            assert saved is not None and part is not None
            restore(head, saved, base)
            self.track = Track(part.carried, list(part.slots))
        else:
            rejoin(head, begin.position, begin.reference, update.version, base, saved)
            self.track = Track(torch.zeros_like(base), [])
            self._holds_nothing(head)
        self.track.at[sequence] = (torch.zeros_like(base), 0)
        self.head = head
        self.knowledge.record_start(self.number, head.state.merged.sequence, head.state.reference)
        self._take_orders(update)

    def _holds_nothing(self, head: Head) -> None:
        """A head that has trained nothing would contribute nothing: its factors are the reference, or B = 0."""
        plan, reference = head.plan, head.state.reference
        for spec in plan.adapted:
            if reference is None and bool(head.state.factors[spec.b_name].any()):
                raise Broken(f"head {self.number} starts without a reference, and B isn't 0")
        if reference is not None:
            parts = [
                head.state.factors[name].detach().reshape(-1) for spec in plan.adapted for name in (spec.a_name, spec.b_name)
            ]
            near(torch.cat(parts), reference, f"head {self.number} starts with other factors than its reference")
        if any(bool(change.any()) for change in head.state.replica_changes().values()):
            raise Broken(f"head {self.number} starts with replicas that aren't the base's")

    @property
    def over(self) -> bool:
        return self.head is not None and (self.head.finished or self.quarantined)

    def train(self, steps: int) -> bool:
        """Takes up to so many steps; whether it took any."""
        head, merge = self.head, self.settings.merge
        if head is None or self.over or self.ended or self.track is None:
            return False
        if merge.wait and (head.outstanding or self.carries()):
            return False
        steps = min(steps, head.steps_left, max(0, self.every - head.steps_since_contribution) if merge.wait else steps)
        if not steps or not head.batch_stream.partitions:
            return False
        before, slots = trained_weights(head), len(self.worker.trained)
        head.train(steps)
        self.track.step(trained_weights(head) - before, self.worker.trained[slots:])
        return True

    def due(self) -> bool:
        """Whether a contribution is to be made now."""
        head = self.head
        if head is None or self.over or self.ended or head.outstanding or self.carries():
            return False
        return head.steps_since_contribution >= self.every or (head.steps_left == 0 and not head.finished)

    def contribute(self) -> None:
        """Makes the contribution and puts it on the wire."""
        assert self.head is not None and self.track is not None
        contribution = self.head.contribute()
        self.track.offer(contribution.sequence)
        self.knowledge.record_contribution(self.number, contribution.sequence, self.head.state.pending)
        self.call("submit", replace(contribution, buffer=contribution.buffer.clone()))

    def look(self) -> None:
        """What a turn of the loop does beside: asks for newer versions, and leaves once all is merged."""
        head = self.head
        if head is None:
            return
        if self.over and not self.left and not self.carries():
            self.left = True
            self.call("leave")
        if not self.settings.merge.wait and not self._watching and not self.over:
            self._watching = True
            self.call("newer", head.version + self.settings.merge.max_lag)

    @property
    def ended(self) -> bool:
        """Whether its `run` has ended: everything is merged, and the coordinator knows."""
        return self.over and self.left and not any(call.kind in ("leave", "submit") for call in self.calls)

    def adopt(self) -> None:
        """Takes what has come, in the order of versions; `HeadActor._take`."""
        if self.head is None:
            return
        arrived, self.arrived = sorted(self.arrived, key=lambda each: each.update.version), []
        for each in arrived:
            self._adopt(self.head, each)

    def _adopt(self, head: Head, arrived: Arrived) -> None:
        update, base = arrived.update, arrived.base
        for save in update.checkpoint_requests:
            self._save(head, save)
        self._take_orders(update)
        verdict = update.result
        if verdict is not None and not verdict.accepted and head.outstanding and verdict.sequence == head.sequence:
            head.adopt(verdict, head.version, None)
            if not verdict.discarded:
                if verdict.harmful:
                    assert self.track is not None
                    self.track.drop(head.state.merged.sequence)
                    if not self.sound:
                        raise Broken(f"head {self.number} has dropped poison, and some is left")
                self.quarantined = self.quarantined or verdict.quarantined
        if base is not None:
            accepted = head.outstanding and update.includes(self.number, head.sequence)
            head.adopt(
                ContributionResult(self.number, head.sequence, True, update.version) if accepted else None, update.version, base
            )

    def _take_orders(self, update: CoordinatorReply) -> None:
        assert self.head is not None
        if not self.left:
            self.head.apply_directive(update.directives[self.number])
            self.every = update.directives[self.number].steps

    def _save(self, head: Head, save: CheckpointRequest) -> None:
        assert self.track is not None
        if self.number not in save.sequences:
            return
        part: Part | None = None
        try:
            state = snapshot(head, save)
        except StateMissed:
            pass
        else:
            part = Part(*state, *self.track.carried(save.sequences[self.number]))
        self.call("saved", (save.version, self.number, part))

    # -- seen from outside -----------------------------------------------------------------------------------------

    @property
    def sound(self) -> bool:
        """Whether no poison is in its weights."""
        head = self.head
        if head is None:
            return False
        return all(bool(torch.isfinite(p).all()) for p in (*head.state.factors.values(), *head.state.replicas.values()))

    def poison(self) -> None:
        """Its next steps give NaN."""
        if self.head is None or self.over:
            return
        with torch.no_grad():
            self.head.state.factors[self.head.plan.adapted[0].b_name].fill_(float("nan"))
