"""Asynchronous successive halving: which trainings end early, from what others had reached after as many samples.

Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020), in the variant that stops trainings instead of
pausing them, as `ray.tune.schedulers.ASHAScheduler` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Halving:
    """Compares trainings at milestones: `first` samples, then `factor` times as many, and so on below `last`.

    A training goes on if, of those that have reached the milestone so far, it is among the best 1/`factor`, or the best. So the
    first one always does, and no training waits for others.

    Args:
        first: samples of the first milestone.
        last: samples of the longest training.
        factor: see above.
    """

    first: float
    last: float
    factor: int
    _costs: dict[float, dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self._costs, milestone = {}, self.first
        while milestone < self.last:
            self._costs[milestone] = {}
            milestone *= self.factor

    def record(self, training: str, samples: int, cost: float) -> str:
        """Records an evaluation, and returns why the training is to end; empty if it goes on.

        An evaluation counts for the last milestone that it has passed, once for each training. Cost: lower is better; infinity
        for what isn't a number.
        """
        passed = [milestone for milestone in self._costs if milestone <= samples]
        if not passed or training in self._costs[passed[-1]]:
            return ""
        others = self._costs[passed[-1]]
        better, number = sum(other <= cost for other in others.values()), len(others) + 1
        others[training] = cost
        if not math.isfinite(cost):
            return f"its figure was no number after {samples:,} samples"
        if better < max(1, number / self.factor):
            return ""
        return f"{better} of {number} trainings were better after {samples:,} samples"
