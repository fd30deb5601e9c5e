"""Observes a policy: checks what it does with its arguments, and records what its decisions should change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lte_ray.layout import Plan
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait
from lte_ray.messages import OuterStep, StepCoefficients


class Violation(Exception):
    """A policy violates a requirement."""


class ObservedPolicy:
    """Forwards to `policy`, and records the change that each of its merges should make to the base.

    Args:
        policy: the policy.
        change_of: returns a head's pending change at weight 1, dense and flat.
        plan: of the base.
        log: receives lines for the trace.

    Attributes:
        expected_changes: the changes of its merges; the caller clears them.
        trial_change: the change of its newest `Try`.
    """

    def __init__(self, policy: MergePolicy, change_of: Callable[[int], Tensor], plan: Plan, log: Callable[[str], None]) -> None:
        self.policy = policy
        self.name = getattr(policy, "name", None) or type(policy).__name__
        self.expected_changes: list[Tensor] = []
        self.trial_change: Tensor | None = None
        self._returned_changes: list[tuple[int, Tensor, Tensor]] = []  # by version: a returned change, and a copy
        self._change_of, self._log, self._plan = change_of, log, plan
        self._momentum = torch.zeros(plan.base.size, dtype=torch.float64)

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        before = [
            (p, p.share.contribution.clone(), None if p.share.reference is None else p.share.reference.clone()) for p in pending
        ]
        decision = self.policy.decide(pending, roster)
        self._log(f"  decides {describe(decision)}")
        if [p for p, _, _ in before] != list(pending):
            raise Violation("it changed the list of pending contributions")
        for p, contribution, reference in before:
            same = torch.equal(p.share.contribution, contribution)
            if not same or (reference is not None and not torch.equal(p.share.reference, reference)):  # type: ignore[arg-type]
                raise Violation(f"it changed the tensors of head {p.head}'s contribution, which it may only read")
        if isinstance(decision, Try):
            trial, momentum = decision, self._momentum
            self.trial_change, momentum_if_kept = self._expected_change(decision.merge)

            def judge(values: Mapping[str, float]) -> Merge | MergeChange | Discard:
                judgement = trial.judge(values)
                self._momentum = momentum if isinstance(judgement, Discard) else momentum_if_kept
                return judgement

            decision = Try(decision.merge, judge)
        elif isinstance(decision, Merge | MergeChange):
            change, self._momentum = self._expected_change(decision)
            self.expected_changes.append(change)
        for version, change, copy in self._returned_changes:
            if not torch.equal(change, copy):
                raise Violation(f"it modified, after its decision, the change that it returned for version {version}")
        merge = decision.merge if isinstance(decision, Try) else decision
        if isinstance(merge, MergeChange) and isinstance(merge.change, Tensor) and bool(torch.isfinite(merge.change).all()):
            self._returned_changes.append((roster.version + 1, merge.change, merge.change.clone()))
        return decision

    def _expected_change(self, merge: Merge | MergeChange) -> tuple[Tensor, Tensor]:
        """The change of the base, and the momentum after it; of NaN if the decision is invalid: the coordinator says why."""
        if isinstance(merge, MergeChange):
            return merge.change.clone() if isinstance(merge.change, Tensor) else torch.tensor(torch.nan), self._momentum
        try:
            terms = [float(weight) * self._change_of(head) for head, weight in merge.weights.items()]
            change = torch.stack(terms).sum(dim=0)
            return (change, self._momentum) if merge.step is None else self._step(change, merge.step)
        except (LookupError, TypeError, ValueError, RuntimeError, AssertionError, AttributeError):
            return torch.tensor(torch.nan), self._momentum

    def _step(self, change: Tensor, step: OuterStep) -> tuple[Tensor, Tensor]:
        """What a step makes of a change."""
        momentum, moved = torch.zeros_like(change), torch.zeros_like(change)
        replicas = {replica.name: replica for replica in self._plan.replicas}
        for entry in self._plan.base.entries:
            part, replica = slice(entry.offset, entry.offset + entry.size), replicas.get(entry.name)
            c = step.factors if replica is None or replica.weight else step.replicas
            c = StepCoefficients() if replica is not None and replica.buffer else c
            momentum[part] = c.keep * self._momentum[part] + c.add * change[part]
            moved[part] = c.change * change[part] + c.momentum * momentum[part]
        return moved, momentum


def describe(decision: object) -> str:
    """Describes a decision in one line, which differs whenever the decision does."""
    if isinstance(decision, Try):
        return f"to try: {describe(decision.merge)}"
    if isinstance(decision, Merge):
        return f"to merge {dict(decision.weights)!r}" + ("" if decision.step is None else f" with {decision.step}")
    if isinstance(decision, MergeChange) and isinstance(decision.change, Tensor):
        data = (
            decision.change.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if decision.change.numel() else b""
        )
        size = float(decision.change.double().norm())
        return f"a change of norm {size:.6g} ({hashlib.sha256(data).hexdigest()[:8]}) for heads {decision.heads!r}"
    if isinstance(decision, Discard):
        return f"to discard heads {decision.heads!r}: {decision.reason}"
    if isinstance(decision, Wait):
        return f"to wait {decision.reason}" + ("" if decision.until is None else f", until {decision.until:.3f}")
    return repr(decision)
