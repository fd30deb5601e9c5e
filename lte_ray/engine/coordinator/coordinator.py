"""The coordinator: owns the main weights, the heads' references and the version; asks the policy and carries it out.

It is driven by events and never waits: `receive` and `leave` return what was decided by them. It knows neither Ray nor
how tensors travel. Where they are in shards (`engine.shard`), it decides by numbers alone.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import initial_partitions
from lte_ray.engine.coordinator.aggregator import BaseWeights, MeasuredContribution, MergeOp, NeedsTensors, RemoteShare
from lte_ray.engine.coordinator.step_budget import StepBudget, StepRateEstimator
from lte_ray.engine.coordinator.validation import OutlierFilter, check_identity, check_magnitude, check_shape, sum_of_squares
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share, dense_part, new_reference, squared_norm
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult, HeadDirective, MergeRecord

PATIENCE = 20
"""How often a policy may ask to be woken once every live head has contributed."""

MOST_WEIGHT = 1e6
"""Bound on the weight that a policy may give a contribution."""


@dataclass(frozen=True)
class _Received:
    """A contribution that isn't decided yet, when it came, and what it would add to the base at weight 1."""

    contribution: Contribution
    at: float
    share: Share
    norm: float | None


@dataclass(frozen=True)
class StepResult:
    """What an event led to: verdicts on contributions, and the merges that were made, in order."""

    results: tuple[ContributionResult, ...]
    merges: tuple[MergeRecord, ...]


class Coordinator:
    """The merging side of one run.

    Args:
        settings: the run's settings.
        plan: what is trained.
        base: the main weights and replicas, flat in the base layout. Taken over and changed in place; its type is the
            type of all merging. None where they are in shards: then contributions are `Measured`, whoever drives this tells
            the shards of the merges, and the policy must decide by weights.
        policy: decides what is merged.
        plans: each head's, where they differ from `plan` in their ranks.
        version: of `base`.
        references: the factors that `base` holds of each head, flat.
        taken, granted: local steps that heads have taken before, and up to which they may.
        standings: what `base` holds of each head.
        fresh: heads whose factors count from B' = 0; heads' processes may still keep others of an earlier coordinator's time.
        members: the heads of the run, where some have left it or come to it since its start; the data of others are free.
        data: whose which batches are.
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
        taken: Mapping[int, int] | None = None,
        granted: Mapping[int, int] | None = None,
        positions: Mapping[int, CommittedPosition] | None = None,
        fresh: Collection[int] = (),
        members: Collection[int] | None = None,
        assignor: PartitionAssignor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.plan, self.policy = settings, plan, policy
        self.version = version  # the newest, which counts merges
        self._master = None if base is None else BaseWeights(base, version, references or {})
        self.waiting_for = ""
        self._asked = 0  # how often in a row the policy waited though nobody else was to come
        self.wakes_at: float | None = None
        self.step_rates = StepRateEstimator(settings.merge)
        self.step_budget = StepBudget(settings, self.step_rates, taken or {}, granted or {})
        self.plans = tuple(plans or [plan] * settings.lte.num_heads)
        self._clock, self._dtype = clock, torch.float32 if base is None else base.dtype
        self._largest_scaling = max([1.0, *(abs(a.scaling) for each in set(self.plans) for a in each.adapted)])
        self._references: dict[int, Tensor | None] = dict(references or {})
        first = range(settings.lte.num_heads)
        self.members = set(first if members is None else members) & {*first, *(positions or {})}
        """Heads that belong to the run: each contribution counts 1/N, with N their number."""
        lanes = {n: initial_partitions(n, settings.lte.num_heads) for n in first}
        self.positions = {n: CommittedPosition(lanes=lanes[n]) for n in first} | dict(positions or {})
        """What the newest version holds of each head."""
        self.assignor = assignor or PartitionAssignor(lanes)
        for gone in self.assignor.heads - self.members:
            self.assignor.remove_head(gone)
        self.live = {n for n in self.members if self.assignor.has_partitions(n)}
        """Heads that train, and that others may have to wait for."""
        self.outlier_filter = OutlierFilter(settings.merge)
        self._fresh = set(fresh)  # heads that have begun with B = 0, and weren't merged since
        self._pending: dict[int, _Received] = {}
        # Incarnation and sequence last received, by head.
        self._newest = {n: (held.incarnation, held.sequence) for n, held in self.positions.items() if held.sequence}
        # What the policy sees of them, by head: with 10,000 heads too much to make anew each time.
        self._shown: list[Pending] = []
        self._trial: tuple[Try, Tensor] | None = None  # and the base that is tried
        self._void = False  # a head whose contribution is tried has left

    @property
    def base_weights(self) -> BaseWeights:
        """The main weights, where they aren't in shards."""
        assert self._master is not None
        return self._master

    @property
    def base(self) -> Tensor:
        """The newest version's main weights and replicas, flat: the coordinator's own, to be read only."""
        return self.base_weights.catch_up()

    @property
    def pending_heads(self) -> list[int]:
        """The heads whose contribution waits for a decision."""
        return sorted(self._pending)

    def reference(self, head: int) -> Tensor | None:
        """The factors that the newest version holds of this head, flat; None where B' = 0."""
        return self._references.get(head)

    def next_directive(self, head: int) -> HeadDirective:
        """What a head is to do next."""
        assignments, revocation = self.assignor.pending_changes(head, self.live)
        return replace(self.step_budget.next_directive(head, self.live), assignments=assignments, revocation=revocation)

    def receive(self, contribution: Contribution, buffer: Tensor | MeasuredContribution) -> StepResult:
        """A contribution arrived; `buffer` is flat, in the contribution layout; it is only read, and kept until it is merged.

        Where tensors are in shards, it is what they have measured.

        A contribution that can't be merged is refused with a reason, and nothing else is touched.

        Raises:
            PolicyError: the policy raised or decided something impossible.
        """
        head = contribution.head
        reason = self.refusal(contribution)
        if reason:
            return self.refuse(contribution, reason)
        wrong = check_shape(buffer, self.plans[head].contribution.size, self._dtype)
        poison = "" if wrong else check_magnitude(sum_of_squares(buffer), self._largest_scaling)
        share = RemoteShare() if wrong or poison else self._share(head, buffer)
        norm = contribution.norm
        if norm is None and self.settings.merge.max_norm_z and not isinstance(share, RemoteShare):
            norm = math.sqrt(squared_norm(share))
        if norm is not None and not (wrong or poison):
            poison = self.outlier_filter.check(head, norm, contribution.steps)
        wrong = wrong or self._out_of_place(contribution)
        if wrong or poison:
            return self.reject(contribution, wrong or poison, poison=bool(poison))
        self._newest[head] = (contribution.incarnation, contribution.sequence)
        self.step_rates.record_steps(head, contribution.steps, contribution.seconds)
        self.step_budget.record_steps(head, contribution.step)
        self._pending[head] = _Received(contribution, self._clock(), share, norm)
        insort(self._shown, self._show(head), key=lambda p: p.head)
        return self._decide()

    def leave(self, head: int) -> StepResult:
        """A head has ended; nobody waits for it any longer.

        Raises:
            PolicyError: as `receive`.
        """
        self.live.discard(head)
        return self._decide()

    def lose(self, head: int) -> StepResult:
        """A head's process is gone, and may come back; nobody waits for it. What it has contributed is still merged.

        Raises:
            PolicyError: as `receive`.
        """
        if head not in self.members:  # it was new, and hadn't joined
            return StepResult((), ())
        pending = self._pending.get(head)
        self.step_budget.reclaim(head, pending.contribution.step if pending else self.positions[head].step)
        return self.leave(head)

    def join(self, head: int, incarnation: int, fresh: bool = False) -> bool:
        """A head (re)starts; nothing of its predecessor's may be pending. Only this incarnation is heard from now on.

        It goes on from what the base holds of it (`standings`); or, if `fresh`, with B = 0, and its predecessor's factors stay
        in the base as weights of its own. A head that is new to the run waits for lanes of data until `ready`.

        Returns:
            Whether it begins with B = 0: nothing that anybody keeps of an earlier head of this number is its reference.
        """
        assert head not in self._pending
        if head not in self.members or head not in self.assignor.heads:  # or one that came before, and no version says so
            steps = [self.positions[other].step for other in self.live]
            step = self.step_budget.admit(head, min(steps, default=0))
            self.positions[head] = CommittedPosition(step=step, version=self.version)
            self.members.add(head)
            self.assignor.add_head(head, self.live)
            fresh = True  # whatever the base holds of one that had this number before isn't this one's
        if self.assignor.has_partitions(head):  # else no one may wait for it: heads give it data when they are merged
            self.live.add(head)
        if fresh:
            self._forget(head)
            self._fresh.add(head)
        self._newest[head] = (incarnation, 0 if fresh else self.positions[head].sequence)
        return fresh

    def _forget(self, head: int) -> None:
        """What the base holds of a head stays in it as weights like any other."""
        self._references.pop(head, None)
        if self._master is not None:
            self._master.forget_head(head)

    def has_data(self, head: int) -> bool:
        """Whether a head that has joined owns data to train on."""
        return self.assignor.has_partitions(head)

    def start_head(self, head: int) -> CommittedPosition:
        """What a head that begins now goes on from; batches that it has trained and not contributed are its to train again."""
        self.live.add(head)
        self.positions[head] = replace(self.positions[head], lanes=self.assignor.start_head(head))
        return self.positions[head]

    def drop(self, head: int) -> StepResult:
        """A head is gone for good: its data go to others, and every contribution counts 1/N of those that are left.

        Raises:
            PolicyError: as `receive`.
        """
        if head not in self.members:
            return StepResult((), ())
        verdicts: tuple[ContributionResult, ...] = ()
        if head in self._pending:  # its data are trained by others
            verdicts = (self._verdict(head, False, f"head {head} has left the run"),)
            del self._pending[head]
            self._void = self._trial is not None
            self._shown = [self._show(other) for other in self.pending_heads]
        self.live.discard(head)
        self.step_budget.reclaim(head, self.positions[head].step)
        self.members.discard(head)
        self._forget(head)
        self.assignor.remove_head(head)
        outcome = self._decide()
        return StepResult((*verdicts, *outcome.results), outcome.merges)

    def tick(self) -> StepResult:
        """`wakes_at` has come: the policy is asked again.

        Raises:
            PolicyError: as `receive`.
        """
        return self._decide()

    @property
    def candidate(self) -> Tensor | None:
        """The base that a policy tries: to be evaluated, and the values to be given to `judged`. None if there is no trial."""
        return None if self._trial is None else self._trial[1]

    def receive_evaluation(self, values: Mapping[str, float]) -> StepResult:
        """The evaluation of `candidate`.

        Raises:
            PolicyError: as `receive`; or the policy's judgement is neither the merge that was tried nor a discard.
        """
        assert self._trial is not None
        tried, self._trial = self._trial[0], None
        if self._void:
            self._void = False
            return self._decide()
        decision = self._guarded(lambda: tried.judge(values))
        if decision is not tried.merge and not isinstance(decision, Discard):
            raise PolicyError(f"{self._policy_name} judged {decision!r}; it must give the merge that was tried, or a Discard.")
        return self._decide(decision)

    def merged_result(self, c: Contribution) -> ContributionResult | None:
        """The verdict on a contribution that was merged before: whoever sends it again hasn't heard it."""
        held = self.positions.get(c.head)
        if (
            held is None
            or not held.sequence
            or c.run != self.settings.run
            or (c.incarnation, c.sequence) != (held.incarnation, held.sequence)
        ):
            return None
        return ContributionResult(c.head, c.sequence, True, held.version)

    def refusal(self, c: Contribution) -> str:
        """Why a contribution can't be merged, as far as its numbers say; empty if they say nothing."""
        if c.head not in self.live:
            return f"head {c.head} isn't one of the live heads {sorted(self.live)}"
        reason = check_identity(c, self.settings.run, self._newest.get(c.head, (-1, -1)), self.version)
        if not reason and c.head in self._pending:
            reason = f"head {c.head} has a contribution that isn't decided yet"
        return reason

    def refuse(self, contribution: Contribution, reason: str) -> StepResult:
        """The verdict on a contribution that can't be merged, which changes nothing."""
        return StepResult((ContributionResult(contribution.head, contribution.sequence, False, self.version, reason),), ())

    def reject(self, c: Contribution, reason: str, poison: bool = True) -> StepResult:
        """The verdict on a contribution whose content can't be merged: if it is poison, its head drops what it held.

        After the third in a row the head is quarantined: it leaves the run, and its data go to others.
        """
        self._newest[c.head] = (c.incarnation, c.sequence)
        self.step_budget.record_steps(c.head, c.step)  # they were taken, whatever became of them
        quarantined = self.outlier_filter.record_refusal(c.head)
        verdict = ContributionResult(c.head, c.sequence, False, self.version, reason, harmful=poison, quarantined=quarantined)
        later = self.drop(c.head) if quarantined else StepResult((), ())
        return StepResult((verdict, *later.results), later.merges)

    def _out_of_place(self, c: Contribution) -> str:
        return self.assignor.mismatch(c.head, c.partitions, c.assignment_id, c.revoked) if c.partitions else ""

    def _share(self, head: int, buffer: Tensor | MeasuredContribution) -> Share:
        if isinstance(buffer, MeasuredContribution):
            return RemoteShare()
        return Share(1.0, self.plans[head], buffer, self._references.get(head))

    def _decide(self, decision: Decision | None = None) -> StepResult:
        """Asks the policy and does what it says, until it waits."""
        verdicts: list[ContributionResult] = []
        merges: list[MergeRecord] = []
        while self._trial is None:  # each turn but the last settles at least one contribution
            decision = decision or self._ask()
            if isinstance(decision, Wait):
                self.waiting_for, self.wakes_at = decision.reason, decision.until
                break
            self.wakes_at = None
            if isinstance(decision, Try):
                self._trial = (decision, self._tried(decision.merge, self._settled(decision.merge)))
                self.waiting_for = "for the evaluation of what it tries"
                break
            heads = self._settled(decision)
            if isinstance(decision, Discard):
                reason = f"the policy discarded it: {decision.reason}"
                verdicts += [replace(self._verdict(h, False, reason), discarded=True) for h in heads]
            else:
                merges.append(self._merge(decision, heads))
                verdicts += [self._verdict(h, True, "") for h in heads]
            for head in heads:
                del self._pending[head]
            self._shown = [self._show(head) for head in self.pending_heads]  # their lags have changed
            decision = None
        return StepResult(tuple(verdicts), tuple(merges))

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
            arrived=received.at,
            share=received.share,
        )

    def _ask(self) -> Decision:
        pending = list(self._shown)
        roster = Roster(max(1, len(self.members)), frozenset(self.live), self.version, self._clock(), self.plan.base)
        decision = self._guarded(lambda: self.policy.decide(pending, roster))
        if not isinstance(decision, Wait | Merge | MergeChange | Discard | Try):
            raise PolicyError(
                f"{self._policy_name} decided {decision!r}; a decision is one of Wait, Merge, MergeChange, Discard and Try."
            )
        if self._master is None and isinstance(decision, MergeChange | Try):
            raise self._needs_tensors(f"decided a {type(decision).__name__}")
        stuck = isinstance(decision, Wait) and bool(pending) and self.live <= self._pending.keys()
        self._asked = self._asked + 1 if stuck else 0
        if isinstance(decision, Wait) and stuck and (decision.until is None or self._asked > PATIENCE):
            raise PolicyError(
                f"{self._policy_name} waits {decision.reason or 'for something'}, but every live head {sorted(self.live)} "
                "has contributed and waits for it: the run could never go on."
            )
        return decision

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except NeedsTensors:
            raise self._needs_tensors("looked at the tensors of a contribution") from None
        except Exception as error:
            raise PolicyError(f"{self._policy_name} raised {type(error).__name__}: {error}") from error

    def _needs_tensors(self, what: str) -> PolicyError:
        return PolicyError(
            f"{self._policy_name} {what}, which needs --shards 1, but --shards is {self.settings.merge.shards}: the tensors "
            "are then in other processes, and a policy can only give weights."
        )

    def _settled(self, decision: Merge | MergeChange | Discard) -> list[int]:
        heads: Any = decision.weights if isinstance(decision, Merge) else decision.heads
        try:
            named = list(heads)
            known = set(named) <= set(self._pending)
        except TypeError:
            named, known = [heads], False
        if not named or not known or len(set(named)) != len(named):
            raise PolicyError(
                f"{self._policy_name} decided about heads {named}, but those with a contribution are {self.pending_heads}."
            )
        return sorted(named)

    def _merge(self, decision: Merge | MergeChange, heads: list[int]) -> MergeRecord:
        weights = self._weights(decision, heads)
        if self._master is not None:
            references = {head: new_reference(self._pending[head].share, self.settings.lte.reset) for head in heads}
            self._master.enqueue(replace(self._operation(decision, heads, weights), references=references))
            self._references.update(references)
        self.version += 1
        merged = [self._pending[h].contribution for h in heads]
        for c in merged:
            self._settle(c)
        return MergeRecord(
            version=self.version,
            at=time.time(),
            heads=tuple(heads),
            step=max(c.step for c in merged),
            taken=self.step_budget.taken,
            steps=sum(c.steps for c in merged),
            samples=sum(c.samples for c in merged),
            losses={c.head: c.loss for c in merged},
            base_error=max(c.base_error for c in merged),
            bytes_up=sum(self.plans[h].contribution.size for h in heads) * self._dtype.itemsize,
            bytes_down=self.plan.base.size * self._dtype.itemsize * len(heads),
            weights=weights,
            lags={c.head: self.version - 1 - c.version for c in merged},
            head_steps={c.head: c.steps for c in merged},
            stalls={c.head: c.stall for c in merged},
            held={c.head: self.positions[c.head] for c in merged},
            fresh=self._begun_since(heads),
        )

    def _begun_since(self, heads: Collection[int]) -> tuple[int, ...]:
        """Those of the heads just merged that had begun with B = 0; from now on the version holds their factors."""
        found = self._fresh & set(heads)
        self._fresh -= found
        return tuple(sorted(found))

    def _settle(self, c: Contribution) -> None:
        """The newest version holds this contribution: what its head has trained until then is done."""
        head = c.head
        before = self.positions[head]
        step, samples = max(c.step, before.step), before.samples + c.samples
        self.positions[head] = CommittedPosition(
            c.incarnation, c.sequence, self.version, step, samples, c.batches, c.partitions
        )
        if c.partitions:
            self.assignor.commit(head, c.partitions, c.assignment_id, c.revoked)
        norm = self._pending[head].norm
        if norm is not None and c.steps:  # one that holds nothing doesn't show that its head is well again
            self.outlier_filter.record_merge(head, norm, c.steps)

    def _operation(self, decision: Merge | MergeChange, heads: list[int], weights: Mapping[int, float]) -> MergeOp:
        if isinstance(decision, MergeChange):
            return MergeOp(self.version + 1, (), self._with_mean_buffers(self._change(decision), heads))
        shares = [replace(self._pending[head].share, weight=weight) for head, weight in weights.items()]
        return MergeOp(self.version + 1, shares)

    def _with_mean_buffers(self, change: Tensor, heads: list[int]) -> Tensor:
        """Running statistics are averages and no direction: an extrapolated variance may be negative. So they are averaged."""
        names = {replica.name for replica in self.plan.replicas if replica.buffer}
        if not names:
            return change
        change = change.clone()
        for name, part in views(self.plan.base, change).items():
            if name in names:
                parts = [dense_part(self._pending[head].share, name) for head in heads]
                part.copy_(torch.stack(parts).sum(0) / len(self.members))
        return change

    def _tried(self, decision: Merge | MergeChange, heads: list[int]) -> Tensor:
        base = self.base.clone()
        self._operation(decision, heads, self._weights(decision, heads)).apply(base)
        return base

    def _weights(self, decision: Merge | MergeChange, heads: Sequence[int]) -> dict[int, float]:
        return {} if isinstance(decision, MergeChange) else {head: self._weight(decision, head) for head in heads}

    def _weight(self, decision: Merge, head: int) -> float:
        weight: Any = decision.weights[head]
        if not isinstance(weight, Real) or not abs(float(weight)) < MOST_WEIGHT:
            raise PolicyError(
                f"{self._policy_name} gave head {head} the weight {weight!r}; it must be a finite number below {MOST_WEIGHT:g}."
            )
        return float(weight)

    def _change(self, decision: MergeChange) -> Tensor:
        given: Any = decision.change
        if not isinstance(given, Tensor) or given.shape != (self.plan.base.size,):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise PolicyError(
                f"{self._policy_name} gave a change of shape {shape}; it must be finite and flat, "
                f"{(self.plan.base.size,)}, in the base layout."
            )
        change: Tensor = given.to(self._dtype)
        if not bool(torch.isfinite(change).all()):
            raise PolicyError(f"{self._policy_name} gave a change that holds NaN or infinity; it must be finite.")
        return change

    def _verdict(self, head: int, accepted: bool, reason: str) -> ContributionResult:
        return ContributionResult(head, self._pending[head].contribution.sequence, accepted, self.version, reason)

    @property
    def _policy_name(self) -> str:
        return f"The merge policy {getattr(self.policy, 'name', None) or type(self.policy).__name__}"
