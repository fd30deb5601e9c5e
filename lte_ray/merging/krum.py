"""Krum: only contributions that others resemble are merged."""

from __future__ import annotations

from collections.abc import Sequence

from lte_ray.merging.arguments import within
from lte_ray.merging.gram import squared_distances
from lte_ray.merging.policy import Merge, Pending, Roster


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
