"""A base that moves by rounded changes loses nothing: base and residual together are what the exact merges give."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor

from lte_ray.engine.coordinator.rounding import make_rounding
from lte_ray.layout import Plan
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(24, 20, 2)], [(700,)])


def move(plan: Plan, send_down: str, changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Base and residual after these changes, from 0."""
    base = torch.zeros(plan.base.size, dtype=changes[0].dtype)
    rounding = make_rounding(plan, send_down, base, None)
    assert rounding is not None
    for change in changes:
        rounding.residual += change
        rounding.move(base)
    return base, rounding.residual


@given(st.integers(1, 30), st.sampled_from(["bf16", "int8"]), st.integers(0, 100))
def test_base_and_residual_are_the_exact_base(merges: int, send_down: str, seed: int) -> None:
    """In float64, and what is left doesn't grow with the number of merges."""
    changes = [random_flat(PLAN.base.size, seed + number) for number in range(merges)]
    base, residual = move(PLAN, send_down, changes)
    assert torch.allclose(base + residual, torch.stack(changes).sum(0), rtol=0, atol=1e-12)
    assert residual.abs().max() < 0.04  # half a step of a block whose largest value is 10


def test_changes_too_small_for_a_step_arrive_later() -> None:
    """In int8, 1e-4 is rounded to 0 if its block also holds 1. It is sent once such changes add up to half a step."""
    change = torch.zeros(PLAN.base.size)
    change[0], change[1] = 1.0, 1e-4
    base, residual = move(PLAN, "int8", [change] * 100)
    assert base[1] > 0
    assert abs(float(base[1] + residual[1]) - 1e-2) < 1e-6


def test_a_variance_never_becomes_negative() -> None:
    """Running statistics are exact, whatever else is in the same block."""
    plan = plan_from_shapes([(24, 20, 2)], [(700,)], statistics=[0])
    change = random_flat(plan.base.size, 3).float()
    base, residual = move(plan, "int8", [change])
    assert torch.equal(base[-700:], change[-700:])
    assert not residual[-700:].any()


def test_exact_bases_are_not_rounded() -> None:
    """Only bf16 and int8 round."""
    assert all(make_rounding(PLAN, way, torch.zeros(PLAN.base.size), None) is None for way in ("auto", "dense", "factors"))
