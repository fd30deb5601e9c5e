"""Robust merges, for runs in which some contributions are bad: median, trimmed mean, Krum and norm clipping."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.low_rank import squared_distances
from lte_ray.merging.policies.elementwise import merged_fraction, reduce_elementwise
from lte_ray.merging.policies.weighted import RollingWeights
from lte_ray.merging.policy import Merge, MergeChange, Pending, Roster
from lte_ray.merging.policy_args import check_range


class Median:
    """Each element moves by k/N times the median of its k changes (arXiv 1803.01498); of an even number, the middle two's mean.

    Tolerates bad contributions as long as most of a merge's are good, so it is meant for ``--when barrier`` or ``quorum``; for
    one or two contributions it is the average. Elements that only one head changed don't move: the median of (x, 0, 0) is 0.
    """

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = reduce_elementwise(pending, roster, _median)
        return MergeChange(change.mul_(merged_fraction(pending, roster)), [p.head for p in pending])


def _median(values: Tensor) -> Tensor:
    """Returns the median over the k contributions: (k, n) -> (n)."""
    ordered, k = values.sort(dim=0).values, values.shape[0]
    return ordered[(k - 1) // 2 : k // 2 + 1].mean(dim=0)


class TrimmedMean:
    """Each element moves by k/N times the mean of its k changes without the b least and the b greatest (arXiv 1803.01498).

    b = trim k, rounded down: up to b bad heads do no harm. With too few contributions to trim (k < 1 / trim) it is the average,
    so it is meant for ``--when barrier`` or ``quorum``.

    Args:
        trim: fraction of the contributions to omit at each end; 0: the average.
    """

    def __init__(self, *, trim: float = 0.25) -> None:
        check_range("trim", trim, 0, 0.5, below=True)
        self.trim = trim

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        trimmed = int(self.trim * len(pending) + 1e-9)  # 0.1 * 30 is just below 3

        def mean(values: Tensor) -> Tensor:
            return values.sort(dim=0).values[trimmed : len(values) - trimmed].mean(dim=0)

        change = reduce_elementwise(pending, roster, mean)
        return MergeChange(change.mul_(merged_fraction(pending, roster)), [p.head for p in pending])


class Krum:
    """Merges, of k contributions, the m with the least sum of squared distances to their k - f - 2 nearest (arXiv 1703.02757).

    Each of the m has weight k / (m N), so that equal contributions merge as with the average. The others have weight 0: they
    are accepted, and their changes are lost. (If they were discarded, the heads' next contributions would repeat the changes,
    ever farther from the others.) Distances come from r x r products of the factors. Tolerates f bad heads if k >= 2 f + 3, so
    it is meant for ``--when barrier`` or ``quorum``; for one or two contributions it is the average.

    Args:
        faulty: f, the number of heads that may be bad.
        keep: m, contributions to merge; 1 is Krum; 0: all but `faulty` (multi-Krum).
    """

    def __init__(self, *, faulty: int = 1, keep: int = 0) -> None:
        check_range("faulty", faulty, 0)
        check_range("keep", keep, 0)
        self.faulty, self.keep = faulty, keep

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        k = len(pending)
        keep = k if k <= 2 else min(k, self.keep or max(1, k - self.faulty))
        scores = dict.fromkeys(range(k), 0.0)
        if keep < k:
            nearest = max(1, k - self.faulty - 2)
            ordered = squared_distances([p.share for p in pending]).sort(dim=1).values
            scores = dict(enumerate(ordered[:, 1 : 1 + nearest].sum(dim=1).tolist()))  # the nearest contribution is itself
        chosen = sorted(scores, key=lambda i: (scores[i], i))[:keep]
        weights = {p.head: 0.0 for p in pending}
        return Merge(weights | {pending[i].head: k / (keep * roster.num_heads) for i in chosen})


class Clip:
    """w = 1/N min(1, c / |D|), with |D| the Euclidean norm of the entire change (arXiv 1911.07963).

    c is `max_norm`, or by default `times` the median norm of the last N contributions, including those being merged. Norms come
    from the factors, and the merge is one by weights.

    Args:
        max_norm: c; 0: relative to the other contributions.
        times: largest norm of a contribution, in median norms.
    """

    def __init__(self, *, max_norm: float = 0.0, times: float = 2.0) -> None:
        check_range("max_norm", max_norm, 0)
        check_range("times", times, 0, above=True)
        self.max_norm, self.times = max_norm, times
        self._window = RollingWeights()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        norms = {p.head: p.norm() for p in pending}
        self._window.add(norms, roster.num_heads)
        limit = self.max_norm or self.times * self._window.median()
        return Merge({head: (limit / norm if norm > limit else 1.0) / roster.num_heads for head, norm in norms.items()})

    def state(self) -> dict[str, Tensor]:
        return {"norms": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("norms"))
