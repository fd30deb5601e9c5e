"""How the changes of the heads in one merge relate: do they agree, and how many directions does their mean have?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.merging.low_rank import Share, gram_matrix, weighted_products


@dataclass(frozen=True)
class ChangeMeasures:
    """Measures of the changes in one merge.

    Attributes:
        alignment: by head, the mean cosine between its change and each other head's; empty with one head. 1 if all agree, 0 if
            they have nothing in common. NaN where a change is 0.
        effective_rank: of the mean change; the mean over the adapted weights that change. None if none does.
    """

    alignment: Mapping[int, float]
    effective_rank: float | None


def measure_changes(shares: Mapping[int, Share]) -> ChangeMeasures:
    """Measures the changes D_n of these heads, each at weight 1.

    The cosines come from the factors (`gram_matrix`). They are of all that is trained, replicas included.
    """
    return ChangeMeasures(_alignment(shares), _mean_effective_rank(list(shares.values())))


def _alignment(shares: Mapping[int, Share]) -> dict[int, float]:
    if len(shares) < 2:
        return {}
    products = gram_matrix(list(shares.values()))
    norms = products.diagonal().clamp(min=0).sqrt()
    cosines = (products / (norms[:, None] * norms[None, :])).clamp(-1, 1)
    means = (cosines.sum(1) - cosines.diagonal()) / (len(shares) - 1)
    return dict(zip(shares, means.tolist(), strict=True))


def _mean_effective_rank(shares: Sequence[Share]) -> float | None:
    ranks = []
    for terms in weighted_products(shares):
        left = torch.cat([c * b.double() for c, b, _ in terms], dim=1)
        rank = effective_rank(left, torch.cat([a.double() for _, _, a in terms]))
        if math.isfinite(rank):
            ranks.append(rank)
    return sum(ranks) / len(ranks) if ranks else None


def effective_rank(b: Tensor, a: Tensor) -> float:
    """Returns (sum_i s_i^2)^2 / sum_i s_i^4 with the singular values s_i of B A: k for k equal ones; NaN for 0.

    This is the participation ratio of the squares of the singular values. It needs no decomposition: the sums are the traces of
    M and M^2, where M has the s_i^2 as eigenvalues. M is (B^T B)(A A^T), or (B A)(B A)^T where that is smaller.

    Args:
        b: (out, r).
        a: (r, in).
    """
    smaller = min(b.shape[0], a.shape[1])
    if b.shape[1] <= smaller:
        m = (b.t() @ b) @ (a @ a.t())
    else:
        product = b @ a if b.shape[0] == smaller else (b @ a).t()
        m = product @ product.t()
    squares = float((m * m.t()).sum())
    return float(m.trace()) ** 2 / squares if squares > 0 else math.nan
