"""What rounding and top-k leave out of a contribution is part of the next one: nothing is lost in the long run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import base_replicas, factor_views, factors_part, replica_part, views
from lte_ray.merging.low_rank import Share, add_contributions
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.numerics import assert_near
from tests.support.plans import plan_from_shapes, random_flat

ROUNDS = 50
PLAN = plan_from_shapes([(20, 30, 2), (7, 90, 3)], [(600,), (5,)], 0.5)
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "int8": math.sqrt(512) / 254}  # of a vector's length, at most (block by block)


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


@pytest.mark.parametrize("transfer", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("topk", [1.0, 0.25])
def test_nothing_is_lost_over_time(transfer: str, topk: float) -> None:
    """A head contributes 50 times, in float64: what was sent and what remains is all it did, and little remains.

    The base holds s B^c A^c of the last decoded factors, and the sum of the decoded replica changes. With rho the share of
    a vector's length that sending leaves out at most, what remains is bounded by rho / (1 - rho) of the longest step.
    """
    merge = MergeConfig(transfer=transfer, replica_topk=topk, shards=2)
    codec = Codec(PLAN, make_groups([PLAN] * 3, merge), merge, torch.float64)
    base, reference = torch.zeros(PLAN.base.size, dtype=torch.float64), None
    size = PLAN.contribution.size - PLAN.factors_size
    factors, replicas, sent = random_flat(PLAN.factors_size, 0), torch.zeros(size).double(), torch.zeros(size).double()
    left_out = ROUNDING[transfer] + (0.0 if topk == 1 else math.sqrt(1 - topk))
    bound = left_out / (1 - left_out)
    steps: list[float] = []
    for n in range(ROUNDS):
        step = 0.1 * random_flat(PLAN.contribution.size, 100 + n)
        factors, replicas = factors + factors_part(PLAN, step), replicas + replica_part(PLAN, step)
        before = factors if reference is None else factors - reference
        buffers, decoded = codec.encode(torch.cat([factors, replicas - sent]), reference)
        received = codec.decode(dict(enumerate(buffers)), reference)
        assert torch.equal(received, decoded)
        add_contributions(base, [Share(1.0, PLAN, received, reference)])
        reference, sent = factors_part(PLAN, decoded), sent + replica_part(PLAN, decoded)
        assert norm(factors - reference) <= ROUNDING[transfer] * norm(before) + 1e-12
        steps.append(norm(replica_part(PLAN, step)))
        assert norm(replicas - sent) <= bound * max(steps) + 1e-12
    assert_near(base_replicas(PLAN, base) + (replicas - sent), replicas, 1e-12)
    assert reference is not None
    assert_held(PLAN, base, reference)
    if topk < 1 or transfer != "fp32":
        assert norm(replicas - sent) > 0  # else this test shows nothing


def assert_held(plan: Plan, base: Tensor, factors: Tensor) -> None:
    """The base's weights are s B A of the factors."""
    weights, named = views(plan.base, base), factor_views(plan, factors)
    for spec in plan.adapted:
        assert_near(weights[spec.name], spec.scaling * named[spec.b_name] @ named[spec.a_name], 1e-12)


def test_without_feedback_rounding_would_add_up() -> None:
    """The same int8 steps, each sent without what the earlier ones left out, end further away."""
    codec = Codec(PLAN, make_groups([PLAN], MergeConfig(transfer="int8")), MergeConfig(transfer="int8"), torch.float64)
    size = PLAN.contribution.size - PLAN.factors_size
    zeros = torch.zeros(PLAN.factors_size, dtype=torch.float64)
    true, with_rest, without = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for n in range(ROUNDS):
        step = random_flat(size, n)
        true = true + step
        with_rest = with_rest + replica_part(PLAN, codec.encode(torch.cat([zeros, true - with_rest]), None)[1])
        without = without + replica_part(PLAN, codec.encode(torch.cat([zeros, step]), None)[1])
    assert norm(true - with_rest) < 0.5 * norm(true - without)
