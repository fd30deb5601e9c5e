"""Merging: the arithmetic of low-rank products, and the policies that decide which contributions are merged, and how.

    low_rank      sums, norms and scalar products of low-rank changes
    outer_step    merges with momentum or another gain than 1
    flat_buffer   named tensors in one flat buffer
    policy        the plug-in point: what a policy sees and what it may decide
    policy_args   a policy's own arguments, checked by their annotations
    policies/     the built-in merge rules by family, and `trigger`: when to merge
    registry      the built-in policies by name; combines a rule and a trigger into a policy

Nothing here depends on the coordinator, which executes the decisions.
"""

from lte_ray.merging.policies.orthogonal import Orthogonal
from lte_ray.merging.policies.outer_optimizers import Adam, DelayedNesterov, Momentum, Nesterov
from lte_ray.merging.policies.robust import Clip, Krum, Median, TrimmedMean
from lte_ray.merging.policies.schedule_free import ScheduleFree
from lte_ray.merging.policies.sparse import Dare, Ties
from lte_ray.merging.policies.trigger import Arrival, Barrier, ComposedPolicy, MergeRule, MergeTrigger, Quorum
from lte_ray.merging.policies.weighted import Average, Samples, Stale
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait, combine
from lte_ray.merging.registry import POLICIES, Gated, make_policy

# The names that earlier releases gave them.
Scheduled = ComposedPolicy
When = MergeTrigger

__all__ = [
    "POLICIES",
    "Adam",
    "Arrival",
    "Average",
    "Barrier",
    "Clip",
    "ComposedPolicy",
    "Dare",
    "Decision",
    "DelayedNesterov",
    "Discard",
    "Gated",
    "Krum",
    "Median",
    "Merge",
    "MergeChange",
    "MergePolicy",
    "MergeRule",
    "MergeTrigger",
    "Momentum",
    "Nesterov",
    "Orthogonal",
    "Pending",
    "Quorum",
    "Roster",
    "Samples",
    "ScheduleFree",
    "Scheduled",
    "Stale",
    "Ties",
    "TrimmedMean",
    "Try",
    "Wait",
    "When",
    "combine",
    "make_policy",
]
