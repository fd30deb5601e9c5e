"""Scalar products of low-rank changes, from their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.flat import factor_views, replica_part, views
from lte_ray.merging.products import Share


def gram(shares: Sequence[Share]) -> Tensor:
    """G_ij = <D_i, D_j> of the whole changes D = s (B A - B' A') and replica changes; (k, k), float64. Weights aren't applied.

    No dense change is made: <B_i A_i, B_j A_j> is the sum of (B_i^T B_j) * (A_i A_j^T), r x r. Costs two products of
    R x out x R and R x in x R a layer, R the sum of all ranks.
    """
    parts = [views(share.plan.contribution, share.contribution) for share in shares]
    references = [None if s.reference is None else factor_views(s.plan, s.reference) for s in shares]
    replicas = torch.stack([replica_part(share.plan, share.contribution) for share in shares]).double()
    total = replicas @ replicas.t()
    for index in range(len(shares[0].plan.adapted)):
        left, right, owners = [], [], []
        for owner, (share, new, old) in enumerate(zip(shares, parts, references, strict=True)):
            spec = share.plan.adapted[index]
            for sign, factors in ((1.0, new), (-1.0, old)):
                if factors is not None:
                    left.append(factors[spec.b].double() * (sign * spec.scaling))
                    right.append(factors[spec.a].double())
                    owners += [owner] * spec.rank
        b, a = torch.cat(left, dim=1), torch.cat(right)
        of = torch.nn.functional.one_hot(torch.tensor(owners, device=b.device), len(shares)).double()
        total += of.t() @ ((b.t() @ b) * (a @ a.t())) @ of
    return total


def squared_distances(shares: Sequence[Share]) -> Tensor:
    """|D_i - D_j|^2, (k, k), float64, never below 0."""
    products = gram(shares)
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_(min=0)
