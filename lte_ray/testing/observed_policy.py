"""Observes a policy: checks what it does with its arguments, and records what its decisions should change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait


class Violation(Exception):
    """A policy violates a requirement."""


class ObservedPolicy:
    """Forwards to `policy`, and records the change that each of its merges should make to the base.

    Args:
        policy: the policy.
        change_of: returns a head's pending change at weight 1, dense and flat.
        log: receives lines for the trace.

    Attributes:
        expected_changes: the changes of its merges; the caller clears them.
        trial_change: the change of its newest `Try`.
    """

    def __init__(self, policy: MergePolicy, change_of: Callable[[int], Tensor], log: Callable[[str], None]) -> None:
        self.policy = policy
        self.name = getattr(policy, "name", None) or type(policy).__name__
        self.expected_changes: list[Tensor] = []
        self.trial_change: Tensor | None = None
        self._returned_changes: list[tuple[int, Tensor, Tensor]] = []  # by version: a returned change, and a copy
        self._change_of, self._log = change_of, log

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
            self.trial_change = self._expected_change(decision.merge)
        elif isinstance(decision, Merge | MergeChange):
            self.expected_changes.append(self._expected_change(decision))
        for version, change, copy in self._returned_changes:
            if not torch.equal(change, copy):
                raise Violation(f"it modified, after its decision, the change that it returned for version {version}")
        merge = decision.merge if isinstance(decision, Try) else decision
        if isinstance(merge, MergeChange) and isinstance(merge.change, Tensor) and bool(torch.isfinite(merge.change).all()):
            self._returned_changes.append((roster.version + 1, merge.change, merge.change.clone()))
        return decision

    def _expected_change(self, merge: Merge | MergeChange) -> Tensor:
        if isinstance(merge, MergeChange):
            return merge.change.clone() if isinstance(merge.change, Tensor) else torch.tensor(torch.nan)
        try:
            terms = [float(weight) * self._change_of(head) for head, weight in merge.weights.items()]
            return torch.stack(terms).sum(dim=0)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError):
            return torch.tensor(torch.nan)  # an invalid decision: the coordinator says why


def describe(decision: object) -> str:
    """Describes a decision in one line, which differs whenever the decision does."""
    if isinstance(decision, Try):
        return f"to try: {describe(decision.merge)}"
    if isinstance(decision, Merge):
        return f"to merge {dict(decision.weights)!r}"
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
