"""Figures of rungs over their seeds, and against ordinary training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lte_ray.ladder.figures import Figure
from lte_ray.ladder.results import ArmResult
from lte_ray.ladder.rungs import ORDINARY
from lte_ray.ladder.sweep import RungResult


@dataclass(frozen=True)
class Summary:
    """One rung at its best rate.

    Attributes:
        result: its arms.
        figure: that is compared.
        values: the figure at the end, for each seed.
        mean, spread: of the values; the spread is their standard deviation, NaN for one seed.
        ratio: of the mean to that of ordinary training; NaN without it.
        behind: how much worse than ordinary training, relative to it (0.05 for 5%).
        reached: samples until the figure is that of ordinary training at its end, as a fraction of its samples; infinity if it
            isn't reached.
        curve: samples and the mean figure at each evaluation, with the lowest and the highest of the seeds.
        sent, ddp: bytes that one head sent and received, and that it would have in data-parallel training; means.
        seconds: of one training; mean.
    """

    result: RungResult
    figure: Figure
    values: tuple[float, ...]
    mean: float
    spread: float
    ratio: float
    behind: float
    reached: float
    curve: tuple[tuple[float, float, float, float], ...]
    sent: float
    ddp: float
    seconds: float

    @property
    def name(self) -> str:
        return self.result.name


def summarize(results: Sequence[RungResult], figure: Figure) -> list[Summary]:
    """Returns a summary of each rung, in their order."""
    ordinary = next((r for r in results if r.name == ORDINARY), None)
    goal = statistics.fmean(_values(ordinary, figure)) if ordinary else math.nan
    total = max((p.samples for arm in ordinary.best.values() for p in arm.points), default=0) if ordinary else 0
    return [_summarize(result, figure, goal, total) for result in results]


def _summarize(result: RungResult, figure: Figure, goal: float, total: int) -> Summary:
    values, arms, heads = _values(result, figure), list(result.best.values()), result.arm.lte.num_heads
    mean, curve = statistics.fmean(values), _curve(result, figure)
    reached = samples_to_reach(goal, [(samples, value) for samples, value, _, _ in curve], figure)
    return Summary(
        result,
        figure,
        values,
        mean,
        spread=statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan,
        ratio=figure.ratio(mean, goal),
        behind=figure.loss_against(mean, goal),
        reached=reached / total if total else math.nan,
        curve=curve,
        sent=statistics.fmean(arm.sent for arm in arms) / heads,
        ddp=statistics.fmean(arm.ddp for arm in arms) / heads,
        seconds=statistics.fmean(arm.seconds for arm in arms),
    )


def _values(result: RungResult, figure: Figure) -> tuple[float, ...]:
    return tuple(arm.final(figure.name) for arm in result.best.values())


def _curve(result: RungResult, figure: Figure) -> tuple[tuple[float, float, float, float], ...]:
    """(samples, mean, lowest, highest) at every evaluation within what all seeds have, on straight lines between theirs."""
    curves = [_numbers(arm, figure) for arm in result.best.values()]
    if not all(curves):
        return ()
    start, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    samples = sorted({x for curve in curves for x, _ in curve if start <= x <= end})
    values = np.array([np.interp(samples, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    return tuple(zip(samples, *(row.tolist() for row in (values.mean(0), values.min(0), values.max(0))), strict=True))


def _numbers(arm: ArmResult, figure: Figure) -> list[tuple[int, float]]:
    """The samples and figures of the evaluations that gave a number."""
    values = [(p.samples, p.figures.get(figure.name, math.nan)) for p in arm.points]
    return [(samples, value) for samples, value in values if math.isfinite(value)]


def samples_to_reach(goal: float, curve: Sequence[tuple[float, float]], figure: Figure) -> float:
    """The samples after which a curve is as good as `goal` for the first time, on straight lines between its points.

    Infinity if it never is; NaN without a goal.
    """
    if math.isnan(goal):
        return math.nan
    before: tuple[float, float] | None = None
    for samples, value in curve:
        cost, wanted = figure.cost(value), figure.cost(goal)
        if cost <= wanted:
            if before is None or before[1] <= cost:
                return samples
            return before[0] + (samples - before[0]) * (before[1] - wanted) / (before[1] - cost)
        before = (samples, cost)
    return math.inf
