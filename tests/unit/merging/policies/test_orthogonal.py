"""The orthogonal outer step, against a singular value decomposition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.layout import Plan, Replica
from lte_ray.merging import Orthogonal, Pending
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
        change, changes = policy.merge(pending, make_roster(3)).change, dense_changes(pending)
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


def test_single_arrivals_move_as_far_as_one_merge() -> None:
    """Each of three arrivals takes a third of a step: its matrices' singular values are a third of one head's."""
    policy, roster = Orthogonal(momentum=0.0), make_roster(3)
    for p in make_pending(3):
        change = policy.merge([p], roster).change
        for a in PLAN.adapted:
            if len(a.shape) > 1:
                part = views(PLAN.base, change)[a.name].reshape(a.shape[0], -1)
                size = float(p.part(a.name).norm()) / math.sqrt(rank_of(p, a.name, a.shape))
                largest = float(torch.linalg.matrix_norm(part, ord=2))
                assert largest == pytest.approx(size / 3, rel=NEAR)


def test_no_change_is_no_step() -> None:
    """Where heads have changed nothing, the base stays, and nothing is divided by zero."""
    plan = Plan((), (Replica("w", (3, 4), weight=True),))
    zero = Pending(0, 0, 0, 1, 1, 0.0, 0.0, Share(1.0, plan, torch.zeros(12, dtype=torch.float64), None))
    change = Orthogonal().merge([zero], make_roster(1)).change
    assert torch.equal(change, torch.zeros_like(change))


def test_the_momentum_is_saved_and_loaded() -> None:
    """A policy that is loaded continues as the one that was saved."""
    one, other = Orthogonal(), Orthogonal()
    one.merge(make_pending(3), make_roster(3))
    other.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    pending = make_pending(3, seed=1)
    assert torch.equal(one.merge(pending, make_roster(3)).change, other.merge(pending, make_roster(3)).change)


@pytest.mark.parametrize("arguments", [{"gain": 0.0}, {"momentum": 1.0}, {"replica_lr": -1.0}, {"replica_momentum": 1.5}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    """With the argument's name."""
    with pytest.raises(ConfigError, match=next(iter(arguments)).replace("_", "-")):
        Orthogonal(**arguments)
