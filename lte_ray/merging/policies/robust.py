"""The coordinate median: one head in two may be wrong.

The trimmed mean: the extremes don't count.

Krum: only contributions that others resemble are merged.

Norm clipping: no contribution moves the base further than others do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.low_rank import squared_distances
from lte_ray.merging.policies.elementwise import by_elements, share_of_all
from lte_ray.merging.policies.weighted import RollingWeights
from lte_ray.merging.policy import Merge, MergeChange, Pending, Roster
from lte_ray.merging.policy_args import within


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


class Krum:
    """Of k contributions the m with the least sum of squared distances to their k - f - 2 nearest (arXiv 1703.02757).

    Each of the m counts k / (m N), so that equal contributions merge as by average; the others count 0: they are accepted,
    and what they hold is dropped. (Discarded, it would ride in the head's next contribution, ever farther from the others.)
    Distances come from r x r products of the factors. Holds f wrong heads off where k >= 2 f + 3, so it is meant for
    ``--when barrier`` or ``quorum``; of one or two contributions it merges the average.

    Args:
        faulty: f, heads that may be wrong.
        keep: m, contributions to merge; 1 is Krum; 0: all but `faulty` (multi-Krum).
    """

    def __init__(self, *, faulty: int = 1, keep: int = 0) -> None:
        within("faulty", faulty, 0)
        within("keep", keep, 0)
        self.faulty, self.keep = faulty, keep

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        k = len(pending)
        keep = k if k <= 2 else min(k, self.keep or max(1, k - self.faulty))
        scores = dict.fromkeys(range(k), 0.0)
        if keep < k:
            nearest = max(1, k - self.faulty - 2)
            ordered = squared_distances([p.share for p in pending]).sort(dim=1).values
            scores = dict(enumerate(ordered[:, 1 : 1 + nearest].sum(dim=1).tolist()))  # the nearest is itself
        chosen = sorted(scores, key=lambda i: (scores[i], i))[:keep]
        weights = {p.head: 0.0 for p in pending}
        return Merge(weights | {pending[i].head: k / (keep * roster.num_heads) for i in chosen})


class Clip:
    """w = 1/N min(1, c / |D|), |D| the Euclidean norm of the whole change (arXiv 1911.07963).

    c is `max_norm`, or else `times` the median norm of the last N contributions, those being merged among them. Norms come
    from the factors, and the merge stays one of weights.

    Args:
        max_norm: c; 0: relative to the other contributions.
        times: how many median norms a contribution may have.
    """

    def __init__(self, *, max_norm: float = 0.0, times: float = 2.0) -> None:
        within("max_norm", max_norm, 0)
        within("times", times, 0, above=True)
        self.max_norm, self.times = max_norm, times
        self._window = RollingWeights()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        norms = {p.head: p.norm() for p in pending}
        self._window.add(norms, roster.num_heads)
        most = self.max_norm or self.times * self._window.median()
        return Merge({head: (most / norm if norm > most else 1.0) / roster.num_heads for head, norm in norms.items()})

    def state(self) -> dict[str, Tensor]:
        return {"norms": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("norms"))
