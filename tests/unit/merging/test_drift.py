"""A thousand merges drift in bfloat16, not in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import factors_part
from lte_ray.merging.low_rank import Share, add_contributions
from tests.support.plans import plan_from_shapes

CYCLES = 1000
PLAN = plan_from_shapes([(24, 16, 2)], [(24,)], scaling=2.0)


def merged(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A thousand reset-less merges of one head into a master of `dtype`, and the same in dense float64.

    Factors and changes are rounded to bfloat16 first, so that every master is given exactly the same numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    start = draw(PLAN.base.size).bfloat16()
    master, exact = start.to(dtype), start.double()
    factors = 0.1 * draw(PLAN.factors_size)
    reference, product = None, torch.zeros(24, 16, dtype=torch.float64)
    for _ in range(CYCLES):
        factors += 0.003 * draw(PLAN.factors_size)
        contribution = torch.cat([factors, 0.01 * draw(24)]).bfloat16()
        add_contributions(master, [Share(0.5, PLAN, contribution.to(dtype), reference)])
        reference = factors_part(PLAN, contribution.to(dtype)).clone()
        sent = contribution.double()
        new = 2.0 * sent[32:80].view(24, 2) @ sent[:32].view(2, 16)
        exact += 0.5 * torch.cat([(new - product).flatten(), sent[80:]])
        product = new
    return master.double(), exact


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0.0, 1e-6), (torch.bfloat16, 1e-2, 1.0)])
def test_a_float32_master_does_not_drift_and_a_bfloat16_master_does(dtype: torch.dtype, low: float, high: float) -> None:
    """After 1000 merges float32 is within 1e-6 of the dense float64 sum (1000 roundings of 6e-8 that add up like a random
    walk); bfloat16, at 4e-3 a rounding, is off by more than a hundredth."""
    master, exact = merged(dtype)
    drift = float(torch.linalg.vector_norm(master - exact) / torch.linalg.vector_norm(exact))
    assert low <= drift < high
