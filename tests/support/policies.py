"""Pending contributions without a coordinator, and their dense changes, for tests of merge policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.layout import Plan
from lte_ray.merging import Merge, MergeChange, Pending, Roster
from lte_ray.merging.low_rank import Share
from lte_ray.merging.outer_step import merge_shares
from tests.support.dense_reference import dense_change_by_formula
from tests.support.plans import plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLAN = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(4,), ()], scaling=2.0)


def make_pending(
    heads: int,
    seed: int = 0,
    *,
    lags: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    version: int = 7,
    same: bool = False,
    referenced: bool = True,
    plan: Plan = PLAN,
) -> list[Pending]:
    """Returns a seeded contribution of each head; with `same`, all have the same tensors."""
    made = []
    for head in range(heads):
        lag = lags[head] if lags else 0
        of = 1000 * seed + (0 if same else head)
        reference = random_flat(plan.factors_size, 500_000 + of) if referenced else None
        share = Share(1.0, plan, random_flat(plan.contribution.size, of), reference)
        made.append(Pending(head, version - lag, lag, 3, samples[head] if samples else 12, 1.0, float(head), share))
    return made


def make_roster(num_heads: int, *, version: int = 7, now: float = 0.0, plan: Plan = PLAN, progress: float = 0.0) -> Roster:
    return Roster(num_heads, frozenset(range(num_heads)), version, now, plan.base, progress)


def dense_change(p: Pending) -> Tensor:
    """Returns the change of a contribution, from the formula."""
    return dense_change_by_formula(p.share.plan, p.share.contribution, p.share.reference)


def dense_changes(pending: Sequence[Pending]) -> Tensor:
    """Returns all dense changes: (k, size of the base)."""
    return torch.stack([dense_change(p) for p in pending])


def change_from_decision(decision: object, pending: Sequence[Pending]) -> Tensor:
    """Returns what a Merge or MergeChange adds to the base, without momentum from before."""
    return Executor(torch.zeros(PLAN.base.size, dtype=torch.float64)).execute(decision, pending)


class Executor:
    """Executes decisions on a base, flat in float64.

    Attributes:
        base: the newest; changed in place.
        momentum: of the outer steps; None while it is 0.
    """

    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.momentum: Tensor | None = None

    def execute(self, decision: object, pending: Sequence[Pending]) -> Tensor:
        """Executes a Merge or MergeChange; returns the base."""
        if isinstance(decision, MergeChange):
            assert list(decision.heads) == [p.head for p in pending]
            self.base += decision.change
        else:
            assert isinstance(decision, Merge)
            shares = [replace(p.share, weight=decision.weights[p.head]) for p in pending if p.head in decision.weights]
            self.momentum = merge_shares(self.base, self.momentum, shares, decision.step)
        return self.base


def make_coordinator(policy: object, heads: int, now: list[float] | None = None) -> tuple[Coordinator, Tensor]:
    """Returns a coordinator whose clock shows `now[0]`, and a copy of its initial base."""
    base, clock = random_flat(PLAN.base.size, 99), now or [0.0]
    coordinator = Coordinator(make_settings(heads=heads), PLAN, base.clone(), policy, clock=lambda: clock[0])  # type: ignore[arg-type]
    return coordinator, base
