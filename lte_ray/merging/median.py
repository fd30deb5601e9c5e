"""The coordinate median: one head in two may be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.entries import by_elements, share_of_all
from lte_ray.merging.policy import MergeChange, Pending, Roster


class Median:
    """Each element moves by k/N times the median of its k changes (arXiv 1803.01498); of an even number, the middle two's mean.

    Robust where most of a merge's contributions are sound, so for ``--when barrier`` or ``quorum``; of one or two
    contributions it is the average. Changes of the elements only one head moved are lost: the median of (x, 0, 0) is 0.
    """

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = by_elements(pending, roster, _median)
        return MergeChange(change.mul_(share_of_all(pending, roster)), [p.head for p in pending])


def _median(values: Tensor) -> Tensor:
    """(k, n) -> (n)."""
    ordered, k = values.sort(dim=0).values, values.shape[0]
    return ordered[(k - 1) // 2 : k // 2 + 1].mean(dim=0)
