"""Checks a comparison before its first training, and collects what advice needs to know about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.prepare import prepare
from lte_ray.ladder.advice import Facts
from lte_ray.ladder.arms import Arm
from lte_ray.ladder.figures import Figure, evaluate
from lte_ray.ladder.multihead import MultiheadTraining
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.run.record import object_name
from lte_ray.worker import Worker


@dataclass(frozen=True)
class Checked:
    """What is compared, and the facts for advice."""

    figure: Figure
    facts: Facts


def check_arms(worker: Worker, arms: Sequence[Arm], rates: Sequence[float], chosen: str) -> Checked:
    """Builds the model, the policy and the optimizer of each arm, and evaluates the untrained model.

    Args:
        arms: one of each rung.
        rates: that they will be trained at.
        chosen: the figure to compare (`Figure.choose`).

    Raises:
        UserError: as a run's; there is no such figure; or a schedule sets rates of its own, so that no sweep is possible.
        WorkerFailed: `evaluate` raised.
    """
    figure: Figure | None = None
    ranks, policy = (0, 0, 0), arms[-1].merge.policy
    optimizers: dict[str, str] = {}
    for arm in arms:
        own = arm.make_worker(worker)
        if arm.mode == "mhlora":
            MultiheadTraining(own, arm.settings)
        else:
            make_policy(arm.merge)
        scaled = max(rates, key=lambda rate: abs(rate - 1))  # a rate of 1 checks nothing
        initial = prepare(own, arm.with_rate(scaled, arm.seed).settings.resolved())
        if figure is None:
            figure = Figure.choose(chosen, evaluate(own, initial.model))
        optimizers[arm.rung] = type(initial.optimizer).__name__
        if initial.plan.adapted:
            ranks = rank_facts(initial.plans)
            policy = choose_policy(arm.settings, initial).policy
    assert figure is not None, "a comparison has arms"
    lte = arms[-1].lte
    alpha = lte.alpha[0] if isinstance(lte.alpha, tuple) else lte.alpha
    builds = callable(getattr(worker, "build_optimizer", None))
    return Checked(figure, Facts(lte.num_heads, *ranks, alpha, object_name(policy), optimizers, builds))


def rank_facts(plans: Sequence[Plan]) -> tuple[int, int, int]:
    """Returns `Facts.total_rank`, `largest_dimension` and `needed_rank` for the plans of all heads.

    The paper's rule is that heads x rank should exceed the largest dimension (arXiv 2402.16828). A head whose rank is min(out,
    in) can make any change of the weight, so more is never needed.
    """
    totals, needed = [], 0
    for specs in zip(*(plan.adapted for plan in plans), strict=True):
        total, largest, smallest = sum(spec.rank for spec in specs), max(specs[0].matrix), min(specs[0].matrix)
        totals.append((total, largest))
        if total < largest and max(spec.rank for spec in specs) < smallest:
            needed = max(needed, min(math.ceil(largest / len(plans)), smallest))
    total, largest = min(totals, key=lambda pair: pair[0] / pair[1])
    return total, largest, needed
