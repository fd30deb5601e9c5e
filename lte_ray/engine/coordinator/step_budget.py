"""Who takes the local steps of a run: each head its own, or all heads together, the faster ones more.

How many local steps each head takes between two contributions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lte_ray.config import MergeConfig
from lte_ray.engine.settings import Settings
from lte_ray.messages import HeadDirective

SMOOTHING = 0.5
"""Share of the former estimate that a new measurement of a head's step time leaves."""

MAX_ROUND = 64
"""A head takes at most so many times `merge_iter` steps, however slow the slowest is."""


class StepRateEstimator:
    """Speed-matched rounds: the slowest head takes `merge_iter` steps, each other as many as fit the same time.

    As the dynamic local updates of asynchronous local SGD (Liu et al. 2024, arXiv 2401.09135, section 5.2). With
    `merge_every` every head takes what fits that time.
    """

    def __init__(self, merge: MergeConfig) -> None:
        self._merge = merge
        self._seconds: dict[int, float] = {}  # of a step, by head

    def record_steps(self, head: int, steps: int, seconds: float) -> None:
        """A head has taken `steps` steps in `seconds`."""
        if steps > 0 and seconds > 0:
            new, old = seconds / steps, self._seconds.get(head)
            self._seconds[head] = new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new

    def share(self, head: int, live: Collection[int]) -> float:
        """This head's part of the steps that the live heads take together in any time; equal parts until speeds are known."""
        everyone = {*live, head}
        if not everyone <= self._seconds.keys():
            return 1 / len(everyone)
        return 1 / (self._seconds[head] * sum(1 / self._seconds[other] for other in everyone))

    def relative_rate(self, head: int, live: Collection[int]) -> float:
        """The mean step rate of the live heads over this head's: the share of a step that all take while it takes one."""
        known = {other: self._seconds[other] for other in {*live, head} if other in self._seconds}
        if head not in known:
            return 1.0
        return sum(known[head] / seconds for seconds in known.values()) / len(known)

    def steps_within(self, head: int, seconds: float) -> int:
        """The steps that this head takes in so many seconds; 0 until its speed is known."""
        return int(seconds / self._seconds[head]) if head in self._seconds else 0

    def round_steps(self, head: int, live: Collection[int]) -> int:
        """The steps of this head's next round, at least 1; `merge_iter` until its speed is known."""
        own, merge = self._seconds.get(head), self._merge
        if own is None or not (merge.match_speed or merge.every_seconds):
            return merge.merge_iter
        if merge.every_seconds:
            return max(1, round(merge.every_seconds / own))
        slowest = max(self._seconds.get(other, 0.0) for other in {*live, head})
        return max(1, min(MAX_ROUND * merge.merge_iter, int(merge.merge_iter * slowest / own)))


ROUNDS_AHEAD = 2
"""Rounds that a head may be granted at once: one whose contribution is on its way, and one that it trains meanwhile."""

SECONDS_AHEAD = 60.0
"""Seconds that a head may go on while nobody grants it more: another coordinator takes some to be there."""

MIN_GRANTS_LEFT = 10
"""For that it is granted this part of what is left for it, at most, so that all heads end together as before."""


def is_shared(settings: Settings) -> bool:
    """Whether the heads share `steps` x `num_heads` local steps, so that a slow head doesn't train on alone at the end."""
    merge, budget = settings.merge, settings.train.budget
    if budget == "auto":
        return not merge.wait or merge.match_speed or bool(merge.merge_every)
    return budget == "shared"


class StepBudget:
    """Grants local steps, a round or two at a time where they are shared; all together heads take exactly what there is.

    Args:
        settings: of the run.
        pace: knows the heads' speeds.
        taken: steps that heads have taken before (a resumed run).
        granted: up to which step they may go, where they know already.
    """

    def __init__(
        self,
        settings: Settings,
        step_rates: StepRateEstimator,
        taken: Mapping[int, int],
        granted: Mapping[int, int] | None = None,
    ) -> None:
        self.shared = is_shared(settings)
        self._steps, self._pace = settings.train.steps, step_rates
        self._total = settings.train.steps * settings.lte.num_heads
        self._taken = dict.fromkeys(range(settings.lte.num_heads), 0) | dict(taken)
        self._granted = dict(self._taken) | dict(granted or {})

    @property
    def taken(self) -> int:
        """Local steps of all heads that contributions have told of."""
        return sum(self._taken.values())

    @property
    def progress(self) -> float:
        """The share of all steps that the contributions hold."""
        return self.taken / self._total

    def record_steps(self, head: int, step: int) -> None:
        """A head has taken `step` local steps in all."""
        self._taken[head] = max(step, self._taken[head])

    def add_head(self, head: int, step: int) -> int:
        """A head is new to the run. Gives the step that it begins at: `step`, so that it ends with the others.

        Where heads share the steps, it is what one that had its number before has taken.
        """
        begins = self._taken.get(head, 0) if self.shared else step
        self._taken[head] = self._granted[head] = begins
        return begins

    def reclaim(self, head: int, step: int) -> None:
        """A head's process is gone, and what it has contributed ends at `step`: what it was granted beyond is free again."""
        self._taken[head] = self._granted[head] = step

    def next_directive(self, head: int, live: Collection[int]) -> HeadDirective:
        """What a head is to do next."""
        steps = self._pace.round_steps(head, live)
        if not self.shared:
            return HeadDirective(steps, self._steps)
        left = max(0, self._total - sum(self._granted.values()))
        # What is left is shared by speed, so that all end together; but rounds shouldn't become ever smaller.
        fair = max(math.ceil(left * self._pace.share(head, live)), min(steps, self._steps) // 4)
        ahead = max(ROUNDS_AHEAD * steps, min(self._pace.steps_within(head, SECONDS_AHEAD), fair // MIN_GRANTS_LEFT))
        grant = min(left, fair, max(0, self._taken[head] + ahead - self._granted[head]))
        if head not in live:  # it has left, and may hear this all the same: what is free again is for others
            return HeadDirective(steps, self._granted[head], True, self._pace.relative_rate(head, live), self.progress)
        self._granted[head] += grant
        return HeadDirective(steps, self._granted[head], left == grant, self._pace.relative_rate(head, live), self.progress)
