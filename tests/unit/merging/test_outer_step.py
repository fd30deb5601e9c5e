"""Merges with an outer step, against dense float64 computations."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging.low_rank import Share, add_contributions, dense_change
from lte_ray.merging.outer_step import merge_shares
from lte_ray.messages import OuterStep, StepCoefficients
from tests.support.numerics import assert_near
from tests.support.plans import random_flat

PLAN = Plan(
    (
        Adapted("wide", (5, 4), 2, 1.5),
        Adapted("turned", (4, 6), 1, 0.5, transposed=True),
        Adapted("kernel", (3, 2, 2, 2), 2, 2.0),
    ),
    (Replica("bias", (3,)), Replica("variance", (4,), buffer=True), Replica("scale", ())),
)
FACTORS, BUFFER = slice(0, 20 + 24 + 24), slice(20 + 24 + 24 + 3, 20 + 24 + 24 + 3 + 4)
NEAR = 1e-13
"""Some ten float64 operations an element over a few merges."""

coefficients = st.builds(StepCoefficients, *[st.sampled_from([0.0, 1.0, 0.7, -0.4])] * 4)


def make_shares(seed: int) -> list[Share]:
    """Two contributions, the second with a reference."""
    flats = [random_flat(PLAN.contribution.size, 10 * seed + head) for head in range(2)]
    references = [None, random_flat(PLAN.factors_size, 1000 + seed)]
    return [Share(0.3 + 0.2 * head, PLAN, flats[head], references[head]) for head in range(2)]


def dense_sum(shares: list[Share]) -> Tensor:
    return torch.stack([dense_change(share) for share in shares]).sum(dim=0)


@given(st.lists(st.one_of(st.none(), st.builds(OuterStep, coefficients, coefficients)), min_size=1, max_size=5))
def test_a_step_is_its_formula(steps: list[OuterStep | None]) -> None:
    """m := keep m + add D, W += change D + momentum m, by part; running statistics move by D; a merge without step keeps m."""
    base, momentum = random_flat(PLAN.base.size, 1), None
    expected, m = base.clone(), torch.zeros_like(base)
    for turn, step in enumerate(steps):
        shares = make_shares(turn)
        change = dense_sum(shares)
        momentum = merge_shares(base, momentum, shares, step)
        if step is None:
            expected += change
        else:
            for part, c in ((FACTORS, step.factors), (slice(FACTORS.stop, None), step.replicas)):
                at = torch.zeros_like(base, dtype=torch.bool)
                at[part], at[BUFFER] = True, False
                m[at] = c.keep * m[at] + c.add * change[at]
                expected[at] += c.change * change[at] + c.momentum * m[at]
            expected[BUFFER] += change[BUFFER]
        assert_near(base, expected, NEAR)
        assert (momentum is not None) == any(s is not None and s.uses_momentum for s in steps[: turn + 1])
        if momentum is not None:
            assert_near(momentum, m, NEAR)


def test_a_run_in_full_rank_takes_the_same_steps() -> None:
    """Its matrices are replicas, and step as those with factors do."""
    step = OuterStep(StepCoefficients(0.5, 1.0, 0.7, 0.35), StepCoefficients(0.2, 0.5, 0.9, 0.1))
    plan, base = PLAN.full_rank(), random_flat(PLAN.base.size, 1)
    whole, momentum, other = base.clone(), None, None
    for turn in range(2):
        shares = make_shares(turn)
        momentum = merge_shares(base, momentum, shares, step)
        full = [Share(1.0, plan, dense_change(share), None) for share in shares]
        other = merge_shares(whole, other, full, step)
    assert_near(whole, base, NEAR)


def test_without_a_step_a_merge_is_that_of_the_average_bit_for_bit() -> None:
    """In fp32; the momentum isn't touched."""
    shares = [replace(s, contribution=s.contribution.float(), reference=None) for s in make_shares(1)]
    base, momentum = random_flat(PLAN.base.size, 1).float(), random_flat(PLAN.base.size, 2).float()
    expected, kept = base.clone(), momentum.clone()
    add_contributions(expected, shares)
    assert merge_shares(base, momentum, shares, None) is momentum
    assert torch.equal(base, expected)
    assert torch.equal(momentum, kept)


def test_the_momentum_is_changed_in_place() -> None:
    """So that no second one is needed."""
    step = OuterStep(StepCoefficients(0.5, 1.0, 0.7, 0.35), StepCoefficients())
    base = random_flat(PLAN.base.size, 1)
    momentum = merge_shares(base, None, make_shares(1), step)
    assert merge_shares(base, momentum, make_shares(2), step) is momentum
