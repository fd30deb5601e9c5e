"""TIES on products: small changes are dropped, and a sign is elected for each element."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.entries import by_elements, largest, share_of_all
from lte_ray.merging.policy import MergeChange, Pending, Roster


class Ties:
    """Trim, elect sign, merge (TIES-Merging, arXiv 2306.01708), on the dense products, never on A and B apart.

    Of each layer's change only the share `density` of largest magnitude is kept. An element's sign is that of its sum over
    the k contributions; those of that sign are averaged, and count k/N. What is dropped is lost: a contribution counts as
    merged. Meant for ``--when barrier`` or ``quorum``; of one contribution it only drops.

    Args:
        density: share of each layer's elements to keep; the paper keeps 0.2.
    """

    def __init__(self, *, density: float = 0.2) -> None:
        within("density", density, 0, 1, above=True)
        self.density = density

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = by_elements(pending, roster, _elected_mean, prepare=lambda values: largest(values, self.density))
        return MergeChange(change.mul_(share_of_all(pending, roster)), [p.head for p in pending])


def _elected_mean(values: Tensor) -> Tensor:
    """(k, n) -> (n): the mean of the values that have the sign of their sum, 0 where there are none."""
    agreeing = values.sign() == values.sum(dim=0).sign()  # zeros agree with a sum of zero, and add nothing
    return (values * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)
