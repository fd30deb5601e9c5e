"""The merge policy of a run that names none: what the heads' optimizer calls for."""

from __future__ import annotations

import dataclasses
import math

from lte_ray.config import MergeConfig
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.optim import Muon

AFFORDABLE_MULTIPLICATIONS = 5e9
"""Most multiplications that orthogonal outer steps may take in a merge by default: about a tenth of a second on a few cores."""

NESTEROV = {"lr": 0.7, "momentum": 0.7}

WITHOUT_BARRIER = {"momentum": 0.5, "replica_momentum": 0.5}
"""Arguments of orthogonal steps from contributions that are some versions behind: with more momentum they overshoot."""


def choose_policy(settings: Settings, initial: Initial) -> MergeConfig:
    """Returns the settings of merging, with a policy in the place of "auto".

    - `orthogonal`, if the heads take orthogonalized steps (LoRA-Muon, Muon), and the coordinator can afford it; with less
      momentum if merges don't wait for all heads;
    - `nesterov` with lr 0.7 and momentum 0.7, if they take such steps and merges wait for all heads, but the matrices are large
      or in shards;
    - `average`, the paper's, for every other optimizer, for a single head, where nothing is merged, and otherwise.

    docs/tuning.md has the figures behind this.
    """
    return resolve_policy(settings, isinstance(initial.optimizer, Muon), initial.plan)


def resolve_policy(settings: Settings, orthogonalizes: bool, plan: Plan) -> MergeConfig:
    """As `choose_policy`, without the run's model.

    Args:
        orthogonalizes: whether the heads' optimizer takes orthogonalized steps.
        plan: the first head's.
    """
    merge = settings.merge
    if merge.policy != "auto":
        return merge
    if not orthogonalizes or settings.lte.num_heads == 1 or merge.never_merge:
        return dataclasses.replace(merge, policy="average")
    if merge.shards == 1 and multiplications(plan) <= AFFORDABLE_MULTIPLICATIONS:
        return dataclasses.replace(merge, policy="orthogonal", policy_args=None if merge.when == "barrier" else WITHOUT_BARRIER)
    if merge.when != "barrier":
        return dataclasses.replace(merge, policy="average")
    return dataclasses.replace(merge, policy="nesterov", policy_args=NESTEROV)


def multiplications(plan: Plan) -> float:
    """Multiplications of an orthogonal outer step: 28 n^3 + 2 m n^2 for each m x n matrix, n its smaller side."""
    shapes = [spec.matrix for spec in plan.adapted if len(spec.shape) > 1]
    shapes += [(replica.shape[0], math.prod(replica.shape[1:])) for replica in plan.replicas if replica.weight]
    return float(sum(28 * min(shape) ** 3 + 2 * max(shape) * min(shape) ** 2 for shape in shapes))
