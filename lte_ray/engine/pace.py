"""How many local steps each head takes between two contributions."""

from __future__ import annotations

from collections.abc import Collection

from lte_ray.config import MergeConfig

KEPT = 0.5
"""Share of the former estimate that a new measurement of a head's step time leaves."""

MOST = 64
"""A head takes at most so many times `merge_iter` steps, however slow the slowest is."""


class Pace:
    """Speed-matched rounds: the slowest head takes `merge_iter` steps, each other as many as fit the same time.

    As the dynamic local updates of asynchronous local SGD (Liu et al. 2024, arXiv 2401.09135, section 5.2). With
    `merge_every` every head takes what fits that time.
    """

    def __init__(self, merge: MergeConfig) -> None:
        self._merge = merge
        self._seconds: dict[int, float] = {}  # of a step, by head

    def note(self, head: int, steps: int, seconds: float) -> None:
        """A head has taken `steps` steps in `seconds`."""
        if steps > 0 and seconds > 0:
            new, old = seconds / steps, self._seconds.get(head)
            self._seconds[head] = new if old is None else KEPT * old + (1 - KEPT) * new

    def share(self, head: int, live: Collection[int]) -> float:
        """This head's part of the steps that the live heads take together in any time; equal parts until speeds are known."""
        everyone = {*live, head}
        if not everyone <= self._seconds.keys():
            return 1 / len(everyone)
        return 1 / (self._seconds[head] * sum(1 / self._seconds[other] for other in everyone))

    def rate(self, head: int, live: Collection[int]) -> float:
        """The mean step rate of the live heads over this head's: the share of a step that all take while it takes one."""
        known = {other: self._seconds[other] for other in {*live, head} if other in self._seconds}
        if head not in known:
            return 1.0
        return sum(known[head] / seconds for seconds in known.values()) / len(known)

    def fitting(self, head: int, seconds: float) -> int:
        """The steps that this head takes in so many seconds; 0 until its speed is known."""
        return int(seconds / self._seconds[head]) if head in self._seconds else 0

    def steps(self, head: int, live: Collection[int]) -> int:
        """The steps of this head's next round, at least 1; `merge_iter` until its speed is known."""
        own, merge = self._seconds.get(head), self._merge
        if own is None or not (merge.match_speed or merge.every_seconds):
            return merge.merge_iter
        if merge.every_seconds:
            return max(1, round(merge.every_seconds / own))
        slowest = max(self._seconds.get(other, 0.0) for other in {*live, head})
        return max(1, min(MOST * merge.merge_iter, int(merge.merge_iter * slowest / own)))
