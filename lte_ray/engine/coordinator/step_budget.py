"""How many local steps each head takes until its next contribution, and in all: its own share, or one of a common budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lte_ray.config import MergeConfig
from lte_ray.engine.settings import Settings
from lte_ray.messages import HeadDirective

SMOOTHING = 0.5
"""Weight of the former estimate of a head's step time when a new measurement comes."""

MAX_ROUND = 64
"""Longest round of a head, in multiples of that of the slowest head."""

ROUNDS_AHEAD = 2
"""Rounds that a head may be granted at once: one whose contribution is on its way, and one that it trains meanwhile."""

SECONDS_AHEAD = 60.0
"""Seconds that a head may train without a new grant, since replacing a lost coordinator takes a while."""

SHARE_DIVISOR = 10
"""For `SECONDS_AHEAD`, a head is granted at most its share of the remaining steps divided by this, so that all heads still end
together."""


class StepRateEstimator:
    """Speed-matched rounds: the slowest head takes the steps of a round, each other as many as fit the same time.

    As the dynamic local updates of asynchronous local SGD (Liu et al. 2024, arXiv 2401.09135, section 5.2). With
    `merge_every`, every head takes what fits that time.
    """

    def __init__(self, merge: MergeConfig) -> None:
        self._merge = merge
        self._seconds: dict[int, float] = {}  # of a step, by head

    def record_steps(self, head: int, steps: int, seconds: float) -> None:
        """Records that a head has taken `steps` steps in `seconds`."""
        if steps > 0 and seconds > 0:
            new, old = seconds / steps, self._seconds.get(head)
            self._seconds[head] = new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new

    def share(self, head: int, live: Collection[int]) -> float:
        """This head's share of the steps that the live heads take together in any time; equal shares until speeds are known."""
        heads = {*live, head}
        if not heads <= self._seconds.keys():
            return 1 / len(heads)
        return 1 / (self._seconds[head] * sum(1 / self._seconds[other] for other in heads))

    def relative_rate(self, head: int, live: Collection[int]) -> float:
        """The live heads' mean step rate divided by this head's: the steps that a head takes on average while it takes one."""
        seconds = {other: self._seconds[other] for other in {*live, head} if other in self._seconds}
        if head not in seconds:
            return 1.0
        return sum(seconds[head] / each for each in seconds.values()) / len(seconds)

    def steps_within(self, head: int, seconds: float) -> int:
        """The steps that this head takes in that time; 0 until its speed is known."""
        return int(seconds / self._seconds[head]) if head in self._seconds else 0

    def round_steps(self, head: int, live: Collection[int], progress: float) -> int:
        """The steps of this head's next round, at least 1; those of any head until its speed is known.

        `progress` is the part of the run that is done when the round begins.
        """
        seconds, merge, steps = self._seconds.get(head), self._merge, self._merge.steps_between(progress)
        if seconds is None or not (merge.match_speed or merge.every_seconds):
            return steps
        if merge.every_seconds:
            return max(1, round(merge.every_seconds / seconds))
        slowest = max(self._seconds.get(other, 0.0) for other in {*live, head})
        return max(1, min(MAX_ROUND * steps, int(steps * slowest / seconds)))


def is_shared(settings: Settings) -> bool:
    """Whether the heads share `steps` x `num_heads` local steps, so that a slow head doesn't train alone at the end."""
    merge, budget = settings.merge, settings.train.budget
    if merge.never_merge:  # each head has an adapter of its own to train to the end
        return False
    if budget == "auto":
        return not merge.wait or merge.match_speed or bool(merge.merge_every)
    return budget == "shared"


class StepBudget:
    """Grants local steps. Where heads share them, it grants a round or two at a time, and all heads together take the total.

    Args:
        settings: of the run.
        step_rates: the heads' speeds.
        taken: steps that heads have taken before (a resumed run).
        granted: up to which step they may go, where they know already.
        members: the heads of the run; by default all that it starts with.
    """

    def __init__(
        self,
        settings: Settings,
        step_rates: StepRateEstimator,
        taken: Mapping[int, int],
        granted: Mapping[int, int] | None = None,
        members: Collection[int] | None = None,
    ) -> None:
        self.shared = is_shared(settings)
        self._steps, self._step_rates = settings.train.steps, step_rates
        self.total = settings.train.steps * settings.lte.num_heads
        """Steps of all heads together, where they share them."""
        self.steps_by_head = dict.fromkeys(range(settings.lte.num_heads), 0) | dict(taken)
        self.steps_granted = dict(self.steps_by_head) | dict(granted or {})
        """Up to which step each head may go, as far as it is granted already."""
        self._members = set(range(settings.lte.num_heads) if members is None else members)
        # Counted along: with 10,000 heads a sum at every event takes too long.
        self.steps_taken = sum(self.steps_by_head.values())
        """Local steps of all heads that contributions have reported."""
        self._steps_of_members = sum(self.steps_by_head.get(head, 0) for head in self._members)

    @property
    def progress(self) -> float:
        """The share of the run's steps that the contributions hold, 0 to 1; of its members' own, unless heads share them."""
        if self.shared:
            return min(1.0, self.steps_taken / self.total)
        return min(1.0, self._steps_of_members / (self._steps * max(1, len(self._members))))

    def record_steps(self, head: int, step: int) -> None:
        """Records that a head has taken `step` local steps in all."""
        self._set_steps(head, max(step, self.steps_by_head[head]))

    def add_head(self, head: int, step: int) -> int:
        """Adds a head that is new to the run.

        Returns:
            The step that it begins at: `step`, so that it ends with the others. Where heads share the steps, what an earlier
            head of its number has taken.
        """
        first = self.steps_by_head.get(head, 0) if self.shared else step
        if head not in self._members:
            self._members.add(head)
            self._steps_of_members += self.steps_by_head.get(head, 0)
        self._set_steps(head, first)
        self.steps_granted[head] = first
        return first

    def remove_head(self, head: int) -> None:
        """Removes a head that has left the run for good; its steps still count as taken."""
        if head in self._members:
            self._members.discard(head)
            self._steps_of_members -= self.steps_by_head.get(head, 0)

    def reclaim(self, head: int, step: int) -> None:
        """Takes back what a head was granted beyond `step`, where its contributions end: its process is gone."""
        self._set_steps(head, step)
        self.steps_granted[head] = step

    def _set_steps(self, head: int, step: int) -> None:
        more = step - self.steps_by_head.get(head, 0)
        self.steps_by_head[head] = step
        self.steps_taken += more
        self._steps_of_members += more if head in self._members else 0

    def next_directive(self, head: int, live: Collection[int], begun: int) -> HeadDirective:
        """What a head is to do next, whose round has begun at its local step `begun`."""
        progress = self.progress if self.shared else begun / self._steps
        steps = self._step_rates.round_steps(head, live, progress)
        if not self.shared:
            return HeadDirective(steps, self._steps)
        left = max(0, self.total - sum(self.steps_granted.values()))
        # The rest is shared by speed, so that all end together. But rounds shouldn't become ever smaller.
        fair = max(math.ceil(left * self._step_rates.share(head, live)), min(steps, self._steps) // 4)
        ahead = max(ROUNDS_AHEAD * steps, min(self._step_rates.steps_within(head, SECONDS_AHEAD), fair // SHARE_DIVISOR))
        grant = min(left, fair, max(0, self.steps_by_head[head] + ahead - self.steps_granted[head]))
        rate = self._step_rates.relative_rate(head, live)
        if head not in live:  # it has left, and may receive this all the same: what is free again is for others
            return HeadDirective(steps, self.steps_granted[head], True, rate, self.progress)
        self.steps_granted[head] += grant
        return HeadDirective(steps, self.steps_granted[head], left == grant, rate, self.progress)
