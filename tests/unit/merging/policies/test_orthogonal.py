"""The orthogonal outer step, against a singular value decomposition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.layout import Plan, Replica
from lte_ray.merging import Merge, MergeChange, Orthogonal, Pending, Roster, combine
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share
from tests.support.numerics import assert_near
from tests.support.plans import random_flat
from tests.support.policies import PLAN, dense_changes, make_pending, make_roster

NEAR = 2e-3
"""The polynomials reach singular values within 1e-5 of 1; those near 1e-3 of the largest are damped more."""


def sign_of(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition."""
    u, _, v = torch.linalg.svd(matrix.reshape(matrix.shape[0], -1), full_matrices=False)
    return (u @ v).view(matrix.shape)


def rank_of(p: Pending, name: str, shape: Sequence[int]) -> int:
    """The largest rank that a head's change of a matrix can have."""
    sides = (shape[0], math.prod(shape[1:]))
    ranks = [a.rank for a in p.share.plan.adapted if a.name == name]
    return min(*sides, *(r if p.share.reference is None else 2 * r for r in ranks))


@pytest.mark.parametrize("plan", [PLAN, PLAN.full_rank()], ids=["factors", "full rank"])
def test_a_step_is_its_formula(plan: Plan) -> None:
    """Over three merges of three heads, for matrices; everything else takes a Nesterov step."""
    policy, momentum = Orthogonal(gain=0.8, momentum=0.6, replica_lr=0.5, replica_momentum=0.4), torch.zeros(plan.base.size)
    momentum = momentum.double()
    for turn in range(3):
        pending = make_pending(3, seed=turn) if plan is PLAN else full_rank_pending(plan, turn)
        change, changes = change_of(policy.merge(pending, make_roster(3))), dense_changes(pending)
        mean = changes.mean(0)
        for name, found in views(plan.base, change).items():
            d, m = views(plan.base, mean)[name], views(plan.base, momentum)[name]
            is_matrix = any(a.name == name and len(a.shape) > 1 for a in PLAN.adapted)
            beta = 0.6 if is_matrix else 0.4
            m.mul_(beta).add_(d)
            if is_matrix:
                sizes = [
                    float(views(plan.base, each)[name].norm()) / math.sqrt(rank_of(p, name, d.shape))
                    for p, each in zip(pending, changes, strict=True)
                ]
                assert_near(found, 0.8 * sum(sizes) / 3 * sign_of(d + beta * m), NEAR)
            else:
                assert_near(found, 0.5 * (d + beta * m), 1e-12)


def full_rank_pending(plan: Plan, seed: int) -> list[Pending]:
    """Contributions of three heads that train whole weights."""
    return [
        Pending(head, 0, 0, 1, 1, 0.0, 0.0, Share(1.0, plan, random_flat(plan.contribution.size, 10 * seed + head), None))
        for head in range(3)
    ]


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1)], ids=str)
def test_a_round_of_arrivals_moves_as_one_merge(groups: tuple[int, ...]) -> None:
    """Over two rounds. The merges within a round add the average; after its last one the base is where one merge puts it."""
    whole, single, roster = Orthogonal(), Orthogonal(), make_roster(3)
    for turn in range(2):
        pending = make_pending(3, seed=turn)
        expected, moved = change_of(whole.merge(pending, roster)), torch.zeros(PLAN.base.size, dtype=torch.float64)
        for position, size in enumerate(groups):
            due = pending[sum(groups[:position]) :][:size]
            decision = single.merge(due, roster)
            assert isinstance(decision, MergeChange) is (position == len(groups) - 1)
            moved += combine(due, decision.weights) if isinstance(decision, Merge) else decision.change
            single = reloaded(single)
        assert_near(moved, expected, 1e-12)


def test_a_round_ends_with_the_heads_that_are_left() -> None:
    """Two of three heads: two thirds of a step."""
    policy, pending = Orthogonal(momentum=0.0), make_pending(3)[:2]
    change = change_of(policy.merge(pending, Roster(3, frozenset({0, 1}), 0, 0.0, PLAN.base)))
    for a in PLAN.adapted:
        if len(a.shape) > 1:
            part = views(PLAN.base, change)[a.name].reshape(a.shape[0], -1)
            sizes = [float(p.part(a.name).norm()) / math.sqrt(rank_of(p, a.name, a.shape)) for p in pending]
            assert float(torch.linalg.matrix_norm(part, ord=2)) == pytest.approx(sum(sizes) / 3, rel=NEAR)


def change_of(decision: Merge | MergeChange) -> Tensor:
    """The change of a merge that ends a round."""
    assert isinstance(decision, MergeChange)
    return decision.change


def reloaded(policy: Orthogonal) -> Orthogonal:
    """A policy that has loaded what another has saved."""
    other = Orthogonal()
    other.load_state({name: tensor.clone() for name, tensor in policy.state().items()})
    return other


def test_no_change_is_no_step() -> None:
    """Where heads have changed nothing, the base stays, and nothing is divided by zero."""
    plan = Plan((), (Replica("w", (3, 4), weight=True),))
    zero = Pending(0, 0, 0, 1, 1, 0.0, 0.0, Share(1.0, plan, torch.zeros(12, dtype=torch.float64), None))
    change = change_of(Orthogonal().merge([zero], make_roster(1)))
    assert torch.equal(change, torch.zeros_like(change))


@pytest.mark.parametrize("heads", [3, 2], ids=["between rounds", "within a round"])
def test_the_state_is_saved_and_loaded(heads: int) -> None:
    """A policy that is loaded continues as the one that was saved."""
    one, roster = Orthogonal(), make_roster(3)
    one.merge(make_pending(3), roster)
    one.merge(make_pending(3, seed=1)[:heads], roster)
    other, pending = reloaded(one), make_pending(3, seed=2)
    assert torch.equal(change_of(one.merge(pending, roster)), change_of(other.merge(pending, roster)))


@pytest.mark.parametrize("arguments", [{"gain": 0.0}, {"momentum": 1.0}, {"replica_lr": -1.0}, {"replica_momentum": 1.5}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    """With the argument's name."""
    with pytest.raises(ConfigError, match=next(iter(arguments)).replace("_", "-")):
        Orthogonal(**arguments)
