"""Sweeps of the learning rate: every rung at several rates on one seed, then at its best rate on all seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lte_ray.ladder.arms import Arm
from lte_ray.ladder.figures import Figure
from lte_ray.ladder.results import ArmResult

MAX_EXTENSIONS = 4
"""How many rates a sweep adds at most, as long as the best lies on its edge."""


@dataclass(frozen=True)
class RungResult:
    """The results of one rung.

    Attributes:
        arm: of the rung, at any rate and seed.
        sweep: results on the seed of the sweep, by rate in ascending order.
        best: results at the best rate, by seed.
        rate: the best.
    """

    arm: Arm
    sweep: Mapping[float, ArmResult]
    best: Mapping[int, ArmResult]
    rate: float

    @property
    def name(self) -> str:
        return self.arm.rung

    @property
    def edge(self) -> str:
        """ "low" or "high" if the best rate is the lowest or highest of several that were tried, else ""."""
        rates = list(self.sweep)
        if len(rates) == 1 or self.rate not in (rates[0], rates[-1]):
            return ""
        return "low" if self.rate == rates[0] else "high"


def climb(
    arm: Arm,
    rates: Sequence[float],
    seeds: Sequence[int],
    run: Callable[[Arm], ArmResult],
    figure: Figure,
    *,
    tuning_seed: int | None = None,
    extend: bool = True,
) -> RungResult:
    """Runs a rung: all rates on one seed, then the best rate on all seeds.

    Args:
        arm: of the rung, at any rate and seed.
        rates: multipliers of the learning rates.
        seeds: of data, weights and A.
        run: gives an arm's result, perhaps an earlier one.
        figure: that decides which rate is best.
        tuning_seed: seed of the sweep; by default the first of `seeds`.
        extend: with two rates or more, try further rates while the best lies on the edge.
    """
    tuned_on = seeds[0] if tuning_seed is None else tuning_seed
    results = {rate: run(arm.with_rate(rate, tuned_on)) for rate in sorted(set(rates))}
    for _ in range(MAX_EXTENSIONS if extend else 0):
        further = further_rate({rate: figure.cost(result.final(figure.name)) for rate, result in results.items()})
        if further is None:
            break
        results[further] = run(arm.with_rate(further, tuned_on))
    results = dict(sorted(results.items()))
    rate = best_rate({rate: figure.cost(result.final(figure.name)) for rate, result in results.items()})
    best = {seed: results[rate] if seed == tuned_on else run(arm.with_rate(rate, seed)) for seed in seeds}
    return RungResult(arm, results, best, rate)


def best_rate(costs: Mapping[float, float]) -> float:
    """The rate of the lowest cost; of several the lowest rate."""
    return min(sorted(costs), key=costs.__getitem__)


def further_rate(costs: Mapping[float, float]) -> float | None:
    """The rate beyond the edge on which the best of several lies, as far from it as its neighbor; None if none does.

    Where all costs are infinite (every training diverged) it is below the lowest.
    """
    rates = sorted(costs)
    if len(rates) < 2:
        return None
    best = best_rate(costs)
    if best == rates[0]:
        return _rounded(best * best / rates[1])
    if best == rates[-1] and math.isfinite(costs[best]):
        return _rounded(best * best / rates[-2])
    return None


def _rounded(rate: float) -> float:
    """Three significant digits, so that rates read well and repeat exactly."""
    return float(f"{rate:.3g}")
