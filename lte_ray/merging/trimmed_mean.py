"""The trimmed mean: the extremes don't count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.entries import by_elements, share_of_all
from lte_ray.merging.policy import MergeChange, Pending, Roster


class TrimmedMean:
    """Each element moves by k/N times the mean of its k changes without the b least and the b greatest (arXiv 1803.01498).

    b = trim k, rounded down: so many wrong heads do no harm. With too few contributions to trim (k < 1 / trim) it is the
    average, so it is meant for ``--when barrier`` or ``quorum``.

    Args:
        trim: share of the contributions that is left out at each end; 0: the average.
    """

    def __init__(self, *, trim: float = 0.25) -> None:
        within("trim", trim, 0, 0.5, below=True)
        self.trim = trim

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        out = int(self.trim * len(pending) + 1e-9)  # 0.1 * 30 is just below 3

        def mean(values: Tensor) -> Tensor:
            return values.sort(dim=0).values[out : len(values) - out].mean(dim=0)

        change = by_elements(pending, roster, mean)
        return MergeChange(change.mul_(share_of_all(pending, roster)), [p.head for p in pending])
