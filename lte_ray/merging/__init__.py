"""Merging: the arithmetic on low-rank products, and the policies that decide what is merged.

A policy is *when* (`when.py`) and *how* (one file each), put together by `scheduled.py`; `registry.py` lists them.
"""

from lte_ray.merging.policies.outer_optimizers import Adam, DelayedNesterov, Momentum, Nesterov
from lte_ray.merging.policies.robust import Clip, Krum, Median, TrimmedMean
from lte_ray.merging.policies.sparse import Dare, Ties
from lte_ray.merging.policies.trigger import Arrival, Barrier, ComposedPolicy, MergeRule, MergeTrigger, Quorum
from lte_ray.merging.policies.weighted import Average, Samples, Stale
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait, combine
from lte_ray.merging.registry import POLICIES, Gated, make_policy

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
    "Pending",
    "Quorum",
    "Roster",
    "Samples",
    "Stale",
    "Ties",
    "TrimmedMean",
    "Try",
    "Wait",
    "combine",
    "make_policy",
]
