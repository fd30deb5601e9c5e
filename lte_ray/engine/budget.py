"""Who takes the local steps of a run: each head its own, or all heads together, the faster ones more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lte_ray.engine.pace import Pace
from lte_ray.engine.settings import Settings
from lte_ray.messages import Order

AHEAD = 2
"""Rounds that a head may be granted at once: one whose contribution is on its way, and one that it trains meanwhile."""

AWAY = 60.0
"""Seconds that a head may go on while nobody grants it more: another coordinator takes some to be there."""

SLICE = 10
"""For that it is granted this part of what is left for it, at most, so that all heads end together as before."""


def is_shared(settings: Settings) -> bool:
    """Whether the heads share `steps` x `num_heads` local steps, so that a slow head doesn't train on alone at the end."""
    merge, budget = settings.merge, settings.train.budget
    if budget == "auto":
        return not merge.wait or merge.match_speed or bool(merge.merge_every)
    return budget == "shared"


class Budget:
    """Grants local steps, a round or two at a time where they are shared; all together heads take exactly what there is.

    Args:
        settings: of the run.
        pace: knows the heads' speeds.
        taken: steps that heads have taken before (a resumed run).
        granted: up to which step they may go, where they know already.
    """

    def __init__(
        self, settings: Settings, pace: Pace, taken: Mapping[int, int], granted: Mapping[int, int] | None = None
    ) -> None:
        self.shared = is_shared(settings)
        self._steps, self._pace = settings.train.steps, pace
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

    def note(self, head: int, step: int) -> None:
        """A head has taken `step` local steps in all."""
        self._taken[head] = max(step, self._taken[head])

    def admit(self, head: int, step: int) -> int:
        """A head is new to the run. Gives the step that it begins at: `step`, so that it ends with the others.

        Where heads share the steps, it is what one that had its number before has taken.
        """
        begins = self._taken.get(head, 0) if self.shared else step
        self._taken[head] = self._granted[head] = begins
        return begins

    def lose(self, head: int, step: int) -> None:
        """A head's process is gone, and what it has contributed ends at `step`: what it was granted beyond is free again."""
        self._taken[head] = self._granted[head] = step

    def order(self, head: int, live: Collection[int]) -> Order:
        """What a head is to do next."""
        steps = self._pace.steps(head, live)
        if not self.shared:
            return Order(steps, self._steps)
        left = max(0, self._total - sum(self._granted.values()))
        # What is left is shared by speed, so that all end together; but rounds shouldn't become ever smaller.
        fair = max(math.ceil(left * self._pace.share(head, live)), min(steps, self._steps) // 4)
        ahead = max(AHEAD * steps, min(self._pace.fitting(head, AWAY), fair // SLICE))
        grant = min(left, fair, max(0, self._taken[head] + ahead - self._granted[head]))
        if head not in live:  # it has left, and may hear this all the same: what is free again is for others
            return Order(steps, self._granted[head], True, self._pace.rate(head, live), self.progress)
        self._granted[head] += grant
        return Order(steps, self._granted[head], left == grant, self._pace.rate(head, live), self.progress)
