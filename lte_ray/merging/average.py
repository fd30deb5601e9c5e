"""The paper's merge: the mean of the heads' products."""

from __future__ import annotations

from collections.abc import Sequence

from lte_ray.merging.policy import Merge, Pending, Roster


class Average:
    """W_{v+1} = W_v + 1/N sum_n s (B_n A_n - B'_n A'_n) (LTE, eq. 7; reset-less, appendix).

    Each contribution counts 1/N with N the number of heads configured, so that N single arrivals equal one merge of all.
    """

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge(average_weights(pending, roster))


def average_weights(pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
    """1/N for each contribution, N the number of heads configured."""
    return {p.head: 1 / roster.num_heads for p in pending}
