"""The coordinator: owns the main weights, the heads' references and the version; asks the policy and carries out its decisions.

It is driven by events and never waits: `receive`, `leave` and the other events return what they led to. It knows neither Ray
nor how tensors travel. Where coordinator shards hold the tensors, it decides by numbers alone (`aggregator.RemoteTensors`).
"""

from __future__ import annotations

import dataclasses
import time
from bisect import insort
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import initial_partitions
from lte_ray.engine.coordinator.aggregator import (
    DecidedMerge,
    LocalTensors,
    MeasuredContribution,
    MergeTensors,
    RemoteShare,
    RemoteTensors,
)
from lte_ray.engine.coordinator.base_weights import BaseWeights
from lte_ray.engine.coordinator.checked_policy import CheckedPolicy
from lte_ray.engine.coordinator.ema import keep_at_merge
from lte_ray.engine.coordinator.merge_record import describe_merge
from lte_ray.engine.coordinator.step_budget import StepBudget, StepRateEstimator
from lte_ray.engine.coordinator.validation import OutlierFilter, check_identity, check_magnitude
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.low_rank import Share
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult, HeadDirective, MergeRecord


@dataclass(frozen=True)
class _Received:
    """A contribution without a decision: when it came, what it would add to the base at weight 1, and its norm."""

    contribution: Contribution
    arrived: float
    share: Share
    norm: float | None


@dataclass(frozen=True)
class EventResult:
    """What an event led to: results of contributions, and the merges that were made, in order."""

    results: tuple[ContributionResult, ...]
    merges: tuple[MergeRecord, ...]

    def refusal(self, c: Contribution) -> ContributionResult | None:
        """The refusal of a contribution that has just come; None if it wasn't refused."""
        refused = (r for r in self.results if not (r.accepted or r.discarded))
        return next((r for r in refused if (r.head, r.sequence) == (c.head, c.sequence)), None)


class Coordinator:
    """The merging side of one run.

    Args:
        settings: the run's settings.
        plan: what is trained.
        base: the main weights and replicas, flat in the base layout. Taken over and changed in place; its type is the
            type of all merging. None where coordinator shards hold them: contributions are then `MeasuredContribution`s, the
            caller tells the shards of the merges, and the policy must decide by weights.
        policy: decides what is merged.
        plans: each head's, where they differ from `plan` in their ranks.
        version: of `base`.
        references: the factors that `base` holds of each head, flat.
        momentum: of the outer steps, as `base`; None if it is 0.
        residual: what rounded changes of the base have left out so far, as `base`; None if it is 0.
        ema: the moving average of the bases up to this one, as `base`; None: it begins here, if the settings have one.
        taken, granted: local steps that heads have taken before, and up to which they may.
        positions: what `base` holds of each head.
        fresh: heads whose factors count from B' = 0, while heads' processes may still keep factors that an earlier
            coordinator knew.
        members: the heads of the run, where some have left or joined since its start; the data of others are free.
        assignor: assigns the batches to heads.
        clock: gives seconds; policies see it.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        base: Tensor | None,
        policy: MergePolicy,
        *,
        plans: Sequence[Plan] | None = None,
        version: int = 0,
        references: dict[int, Tensor] | None = None,
        momentum: Tensor | None = None,
        residual: Tensor | None = None,
        ema: Tensor | None = None,
        taken: Mapping[int, int] | None = None,
        granted: Mapping[int, int] | None = None,
        positions: Mapping[int, CommittedPosition] | None = None,
        fresh: Collection[int] = (),
        members: Collection[int] | None = None,
        assignor: PartitionAssignor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.plan, self.policy, self._clock = settings, plan, policy, clock
        plans = self.plans = tuple(plans or [plan] * settings.lte.num_heads)
        self.version = version  # the newest, which counts merges
        reset, down = settings.lte.reset, settings.merge.send_down
        self._tensors: MergeTensors = RemoteTensors()
        if base is not None:
            ema = base.clone() if settings.train.ema and ema is None else ema
            self._tensors = LocalTensors(plan, plans, base, version, references or {}, reset, momentum, down, residual, ema)
        shards, tensors = settings.merge.shards, self._tensors
        self._checked_policy = CheckedPolicy(policy, shards, tensors.local, plan.base.size, tensors.dtype)
        self.waiting_for = ""
        self.wakes_at: float | None = None
        self.step_rates = StepRateEstimator(settings.merge)
        self._largest_scaling = max([1.0, *(abs(a.scaling) for each in set(self.plans) for a in each.adapted)])
        first = range(settings.lte.num_heads)
        self.members = set(first if members is None else members) & {*first, *(positions or {})}
        """Heads that belong to the run: each contribution counts 1/N, with N their number."""
        self.step_budget = StepBudget(settings, self.step_rates, taken or {}, granted or {}, self.members)
        partitions = {n: initial_partitions(n, settings.lte.num_heads) for n in first}
        self.positions = {n: CommittedPosition(lanes=partitions[n]) for n in first} | dict(positions or {})
        """What the newest version holds of each head."""
        self.assignor = assignor or PartitionAssignor(partitions)
        for head in self.assignor.heads - self.members:
            self.assignor.remove_head(head)
        self.live = {n for n in self.members if self.assignor.has_partitions(n)}
        """Heads that train, and that others may have to wait for."""
        self.outlier_filter = OutlierFilter(settings.merge)
        self._fresh = set(fresh)  # heads that have begun with B = 0, and weren't merged since
        self._pending: dict[int, _Received] = {}
        # Incarnation and sequence last received, by head.
        self._newest = {n: (p.incarnation, p.sequence) for n, p in self.positions.items() if p.sequence}
        # What the policy sees of them, sorted by head: with 10,000 heads too much to build for every event.
        self._shown: list[Pending] = []
        self._trial: tuple[Try, Tensor] | None = None  # and the base that is tried
        self._trial_void = False  # a head whose contribution is tried has left

    # -- what the newest version holds -----------------------------------------------------------------------------------

    @property
    def base_weights(self) -> BaseWeights:
        """The main weights, where they aren't in shards."""
        assert isinstance(self._tensors, LocalTensors)
        return self._tensors.base_weights

    @property
    def base(self) -> Tensor:
        """The newest version's main weights and replicas, flat: the coordinator's own, to be read only."""
        return self.base_weights.catch_up()

    @property
    def ema(self) -> Tensor | None:
        """The moving average of the bases, as `base`; None if there is none."""
        return self.base_weights.read(lambda newest: newest.ema)

    def reference(self, head: int) -> Tensor | None:
        """The factors that the newest version holds of this head, flat; None where B' = 0."""
        assert isinstance(self._tensors, LocalTensors)
        return self._tensors.references.get(head)

    @property
    def pending_heads(self) -> list[int]:
        """The heads whose contribution waits for a decision."""
        return sorted(self._pending)

    @property
    def steps_taken(self) -> int:
        """Local steps of all heads that contributions have reported."""
        return self.step_budget.steps_taken

    @property
    def shares_steps(self) -> bool:
        """Whether the heads share their local steps, so that one that starts first could take another's."""
        return self.step_budget.shared

    def assignment_state(self) -> dict[str, Any]:
        """Which head owns which batches, as `PartitionAssignor.from_state` reads it."""
        return self.assignor.state()

    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the coordinator."""
        standings = {str(head): dataclasses.asdict(each) for head, each in self.positions.items() if head in self.members}
        return {"standings": standings, "ledger": self.assignment_state(), "guard": self.outlier_filter.state()}

    def policy_state(self) -> dict[str, Tensor]:
        """What the policy keeps from one merge to the next. The tensors may be the policy's own."""
        return self._checked_policy.state()

    def load_policy_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `policy_state` gave."""
        self._checked_policy.load_state(tensors)

    def load_outlier_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `checkpoint_facts` gave as "guard"."""
        self.outlier_filter.load_state(state)

    # -- contributions ---------------------------------------------------------------------------------------------------

    def receive(self, contribution: Contribution, buffer: Tensor | MeasuredContribution) -> EventResult:
        """A contribution arrived. One that can't be merged is refused with a reason, and nothing else is touched.

        Args:
            contribution: its numbers.
            buffer: flat, in the contribution layout. It is only read, and kept until it is merged. Where shards hold the
                tensors, what they have measured.

        Raises:
            PolicyError: the policy raised or decided something impossible.
        """
        head = contribution.head
        refusal = self.refuse_by_numbers(contribution)
        if refusal is not None:
            return refusal
        share, norm, malformed, harmful = self._inspect(contribution, buffer)
        if malformed or harmful:
            return self.reject(contribution, malformed or harmful, harmful=bool(harmful))
        self._newest[head] = (contribution.incarnation, contribution.sequence)
        self.step_rates.record_steps(head, contribution.steps, contribution.seconds)
        self.step_budget.record_steps(head, contribution.step)
        self._pending[head] = _Received(contribution, self._clock(), share, norm)
        insort(self._shown, self._show(head), key=lambda p: p.head)
        return self._decide()

    def merged_result(self, c: Contribution) -> ContributionResult | None:
        """The result of a contribution that was merged before: a head that sends it again hasn't received it."""
        position = self.positions.get(c.head)
        if position is None or not position.sequence or c.run != self.settings.run:
            return None
        if (c.incarnation, c.sequence) != (position.incarnation, position.sequence):
            return None
        return ContributionResult(c.head, c.sequence, True, position.version)

    def refuse_by_numbers(self, c: Contribution) -> EventResult | None:
        """The refusal of a contribution whose numbers forbid to merge it; None if they don't."""
        if c.head not in self.live:
            return self.refuse(c, f"head {c.head} isn't one of the live heads {sorted(self.live)}")
        reason = check_identity(c, self.settings.run, self._newest.get(c.head, (-1, -1)), self.version)
        if not reason and c.head in self._pending:
            reason = f"head {c.head} has a contribution that isn't decided yet"
        return self.refuse(c, reason) if reason else None

    def refuse(self, contribution: Contribution, reason: str) -> EventResult:
        """Refuses a contribution, which changes nothing."""
        return EventResult((ContributionResult(contribution.head, contribution.sequence, False, self.version, reason),), ())

    def reject(self, c: Contribution, reason: str, harmful: bool = True) -> EventResult:
        """Refuses a contribution for its content. If that is harmful, its head drops the changes.

        After the third in a row the head is quarantined: it leaves the run, and its data go to others.
        """
        self._newest[c.head] = (c.incarnation, c.sequence)
        self.step_budget.record_steps(c.head, c.step)  # they were taken, even if they are lost
        quarantined = self.outlier_filter.record_refusal(c.head)
        result = ContributionResult(c.head, c.sequence, False, self.version, reason, harmful=harmful, quarantined=quarantined)
        later = self.drop(c.head) if quarantined else EventResult((), ())
        return EventResult((result, *later.results), later.merges)

    def _inspect(self, c: Contribution, buffer: Tensor | MeasuredContribution) -> tuple[Share, float | None, str, str]:
        """A contribution's share and norm; why it can't be merged, and why its content would harm the base."""
        malformed, harmful = self._tensors.check_shape(c.head, buffer), ""
        if not malformed:
            harmful = check_magnitude(self._tensors.sum_of_squares(buffer), self._largest_scaling)
        share: Share = RemoteShare()
        norm = c.norm
        if not (malformed or harmful):
            share = self._tensors.share(c.head, buffer)
            if norm is None and self.settings.merge.max_norm_z:
                norm = self._tensors.norm(share)
            if norm is not None:
                harmful = self.outlier_filter.check(c.head, norm, c.steps)
        if not malformed and c.partitions:
            malformed = self.assignor.mismatch(c.head, c.partitions, c.assignment_id, c.revoked)
        return share, norm, malformed, harmful

    # -- heads -----------------------------------------------------------------------------------------------------------

    def join(self, head: int, incarnation: int, fresh: bool = False) -> bool:
        """A head (re)starts; its predecessor must have nothing pending. From now on only this incarnation is accepted.

        It continues from what the base holds of it (`positions`); or, if `fresh`, with B = 0, and its predecessor's factors
        stay in the base as ordinary weights. A head that is new to the run waits for data until `has_data`.

        Returns:
            Whether it begins with B = 0: factors that any process keeps of an earlier head of this number aren't its reference.
        """
        assert head not in self._pending
        if head not in self.members or head not in self.assignor.heads:  # or one that joined before, but no version knows
            step = self.step_budget.add_head(head, min((self.positions[other].step for other in self.live), default=0))
            self.positions[head] = CommittedPosition(step=step, version=self.version)
            self.members.add(head)
            self.assignor.add_head(head, self.live)
            fresh = True  # what the base holds of an earlier head of this number isn't this one's
        if self.assignor.has_partitions(head):  # else no head may wait for it yet: others give it data as they are merged
            self.live.add(head)
        if fresh:
            self._tensors.forget_head(head)
            self._fresh.add(head)
        self._newest[head] = (incarnation, 0 if fresh else self.positions[head].sequence)
        return fresh

    def has_data(self, head: int) -> bool:
        """Whether a head that has joined owns data to train on."""
        return self.assignor.has_partitions(head)

    def start_head(self, head: int) -> CommittedPosition:
        """What a head that begins now continues from: it trains again the batches that it hadn't contributed."""
        self.live.add(head)
        self.positions[head] = replace(self.positions[head], lanes=self.assignor.start_head(head))
        return self.positions[head]

    def next_directive(self, head: int) -> HeadDirective:
        """What a head is to do next."""
        assignments, revocation = self.assignor.pending_changes(head, self.live)
        directive = self.step_budget.next_directive(head, self.live, self.positions[head].step)
        return replace(directive, assignments=assignments, revocation=revocation)

    def leave(self, head: int) -> EventResult:
        """A head has ended: the others no longer wait for it.

        Raises:
            PolicyError: as `receive`.
        """
        self.live.discard(head)
        return self._decide()

    def lose(self, head: int) -> EventResult:
        """A head's process is gone, and may come back; the others don't wait for it. Its contribution is still merged.

        Raises:
            PolicyError: as `receive`.
        """
        if head not in self.members:  # it was new, and hadn't joined
            return EventResult((), ())
        pending = self._pending.get(head)
        self.step_budget.reclaim(head, pending.contribution.step if pending else self.positions[head].step)
        return self.leave(head)

    def drop(self, head: int) -> EventResult:
        """A head is gone for good: its data go to others, and every contribution counts 1/N of the remaining heads.

        Raises:
            PolicyError: as `receive`.
        """
        if head not in self.members:
            return EventResult((), ())
        if self.settings.merge.never_merge:
            return self.lose(head)  # its adapter stays, and no other head trains its data
        results: tuple[ContributionResult, ...] = ()
        if head in self._pending:  # others train its data
            results = (self._result(head, False, f"head {head} has left the run"),)
            del self._pending[head]
            self._trial_void = self._trial is not None
            self._shown = [self._show(other) for other in self.pending_heads]
        self.live.discard(head)
        self.step_budget.reclaim(head, self.positions[head].step)
        self.members.discard(head)
        self.step_budget.remove_head(head)
        self._tensors.forget_head(head)
        self.assignor.remove_head(head)
        event_result = self._decide()
        return EventResult((*results, *event_result.results), event_result.merges)

    # -- decisions -------------------------------------------------------------------------------------------------------

    def tick(self) -> EventResult:
        """`wakes_at` has come: asks the policy again.

        Raises:
            PolicyError: as `receive`.
        """
        return self._decide()

    @property
    def candidate(self) -> Tensor | None:
        """The base that a policy tries, whose evaluation goes to `receive_evaluation`; None if there is no trial."""
        return None if self._trial is None else self._trial[1]

    def receive_evaluation(self, values: Mapping[str, float]) -> EventResult:
        """The evaluation of `candidate`.

        Raises:
            PolicyError: as `receive`; or the policy's judgement is neither the merge that was tried nor a discard.
        """
        assert self._trial is not None
        trial, self._trial = self._trial[0], None
        if self._trial_void:
            self._trial_void = False
            return self._decide()
        return self._decide(self._checked_policy.judge(trial, values))

    def _decide(self, decision: Decision | None = None) -> EventResult:
        """Asks the policy and carries out its decisions until it waits."""
        results: list[ContributionResult] = []
        merges: list[MergeRecord] = []
        while self._trial is None:  # each turn but the last settles at least one contribution
            decision = decision or self._checked_policy.decide(list(self._shown), self._roster())
            if isinstance(decision, Wait):
                self.waiting_for, self.wakes_at = decision.reason, decision.until
                break
            self.wakes_at = None
            if isinstance(decision, Try):
                heads = self._checked_policy.heads(decision.merge, self._pending)
                self._trial = (decision, self._tensors.preview(self._decided_merge(decision.merge, heads)))
                self.waiting_for = "for the evaluation of what it tries"
                break
            heads = self._checked_policy.heads(decision, self._pending)
            if isinstance(decision, Discard):
                reason = f"the policy discarded it: {decision.reason}"
                results += [replace(self._result(h, False, reason), discarded=True) for h in heads]
            else:
                merges.append(self._merge(decision, heads))
                results += [self._result(h, True, "") for h in heads]
            for head in heads:
                del self._pending[head]
            self._shown = [self._show(head) for head in self.pending_heads]  # their lags have changed
            decision = None
        return EventResult(tuple(results), tuple(merges))

    def _roster(self) -> Roster:
        heads, progress = max(1, len(self.members)), self.step_budget.progress
        return Roster(heads, frozenset(self.live), self.version, self._clock(), self.plan.base, progress)

    def _show(self, head: int) -> Pending:
        received = self._pending[head]
        c = received.contribution
        return Pending(
            head=head,
            version=c.version,
            lag=self.version - c.version,
            steps=c.steps,
            samples=c.samples,
            loss=c.loss,
            arrived=received.arrived,
            share=received.share,
        )

    def _decided_merge(self, decision: Merge | MergeChange, heads: Sequence[int]) -> DecidedMerge:
        shares, checked = {head: self._pending[head].share for head in heads}, self._checked_policy
        if self.settings.merge.never_merge:  # the version differs in its references only
            return DecidedMerge(self.version + 1, shares, {}, None, len(self.members))
        weights, step, change = checked.weights(decision, heads), checked.outer_step(decision), checked.change(decision)
        steps = {head: self._pending[head].contribution.step for head in heads}
        keep = keep_at_merge(self.settings.train.ema, self.positions, self.members, steps)
        return DecidedMerge(self.version + 1, shares, weights, change, len(self.members), step, keep)

    def _merge(self, decision: Merge | MergeChange, heads: list[int]) -> MergeRecord:
        decided = self._decided_merge(decision, heads)
        every = self.settings.merge.measure_every
        measures = self._tensors.measure(decided) if every and decided.version % every == 0 else {}
        self._tensors.merge(decided)
        self.version = decided.version
        merged = [self._pending[h].contribution for h in heads]
        for c in merged:
            self._commit(c)
        return describe_merge(
            decided,
            merged,
            self.plans,
            self._tensors.dtype.itemsize,
            steps_taken=self.steps_taken,
            positions={c.head: self.positions[c.head] for c in merged},
            fresh=self._pop_fresh(heads),
            **measures,
        )

    def _pop_fresh(self, heads: Collection[int]) -> tuple[int, ...]:
        """Those of the heads just merged that had begun with B = 0; from now on the version holds their factors."""
        fresh = self._fresh & set(heads)
        self._fresh -= fresh
        return tuple(sorted(fresh))

    def _commit(self, c: Contribution) -> None:
        """Records that the newest version holds this contribution: what its head trained until then is done."""
        head = c.head
        before = self.positions[head]
        step, samples = max(c.step, before.step), before.samples + c.samples
        self.positions[head] = CommittedPosition(
            c.incarnation, c.sequence, self.version, step, samples, c.batches, c.partitions
        )
        if c.partitions:
            self.assignor.commit(head, c.partitions, c.assignment_id, c.revoked)
        if c.steps:  # one without steps doesn't show that its head has recovered
            self.outlier_filter.record_merge(head, self._pending[head].norm, c.steps)

    def _result(self, head: int, accepted: bool, reason: str) -> ContributionResult:
        return ContributionResult(head, self._pending[head].contribution.sequence, accepted, self.version, reason)
