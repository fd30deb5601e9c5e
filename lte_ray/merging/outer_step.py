"""Merges with a step: what is done with the sum of the changes where there is momentum, or another gain than 1.

The coordinator, its shards and the heads that redo merges all call `merge_shares`, which does the same operations in the same
order on each entry of the base, so that their bases and momenta are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import as_matrix, base_replicas, replica_views, views
from lte_ray.merging.low_rank import Share, add_contributions, add_products, add_replica_changes, weighted_products
from lte_ray.messages import OuterStep, StepCoefficients

AVERAGE = StepCoefficients()
"""The step of running statistics, whose extrapolation may be a negative variance."""


def merge_shares(base: Tensor, momentum: Tensor | None, shares: Sequence[Share], step: OuterStep | None) -> Tensor | None:
    """W := W + D without a `step`, else m := keep m + add D and W := W + change D + momentum m; D = sum_n w_n D_n; in place.

    A step needs room for D of one entry of the base at a time, and for that of the replicas.

    Args:
        base: flat, in the base layout.
        momentum: m, as `base`; None if it is 0.
        shares: in the order in which their changes are added; their plans have the same base layout.
        step: the coefficients, for weights with factors and for replicas.

    Returns:
        The momentum: a new tensor if there was none and the step adds to it.
    """
    if step is None or not shares:
        add_contributions(base, shares)
        return momentum
    if momentum is None and step.uses_momentum:
        momentum = torch.zeros_like(base)
    plan = shares[0].plan
    weights = views(plan.base, base)
    momenta = {} if momentum is None else views(plan.base, momentum)
    room = base.new_empty(max((math.prod(adapted.shape) for adapted in plan.adapted), default=0))
    for adapted, terms in zip(plan.adapted, weighted_products(shares), strict=True):
        change = room[: math.prod(adapted.shape)].view(adapted.shape).zero_()
        add_products(as_matrix(adapted, change), terms)
        _take_step(weights[adapted.name], momenta.get(adapted.name), change, step.factors)
    replicas = torch.zeros_like(base_replicas(plan, base))
    add_replica_changes(replicas, shares)
    changes = replica_views(plan, replicas)
    for replica in plan.replicas:
        coefficients = AVERAGE if replica.buffer else step.factors if replica.weight else step.replicas
        _take_step(weights[replica.name], momenta.get(replica.name), changes[replica.name], coefficients)
    return momentum


def _take_step(weight: Tensor, momentum: Tensor | None, change: Tensor, coefficients: StepCoefficients) -> None:
    if momentum is not None and coefficients.keep != 1:
        momentum.mul_(coefficients.keep)
    if momentum is not None and coefficients.add:
        momentum.add_(change, alpha=coefficients.add)
    if coefficients.change:
        weight.add_(change, alpha=coefficients.change)
    if momentum is not None and coefficients.momentum:
        weight.add_(momentum, alpha=coefficients.momentum)
