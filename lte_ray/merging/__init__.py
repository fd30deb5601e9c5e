"""Merging: the arithmetic on low-rank products, and the policies that decide what is merged.

A policy is *when* (`when.py`) and *how* (one file each), put together by `scheduled.py`; `registry.py` lists them.
"""

from lte_ray.merging.adam import Adam
from lte_ray.merging.average import Average
from lte_ray.merging.clip import Clip
from lte_ray.merging.dare import Dare
from lte_ray.merging.delayed_nesterov import DelayedNesterov
from lte_ray.merging.gated import Gated
from lte_ray.merging.krum import Krum
from lte_ray.merging.median import Median
from lte_ray.merging.momentum import Momentum
from lte_ray.merging.nesterov import Nesterov
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait, combine
from lte_ray.merging.registry import POLICIES, make_policy
from lte_ray.merging.samples import Samples
from lte_ray.merging.scheduled import MergeRule, Scheduled
from lte_ray.merging.stale import Stale
from lte_ray.merging.ties import Ties
from lte_ray.merging.trimmed_mean import TrimmedMean
from lte_ray.merging.when import Arrival, Barrier, Quorum, When

__all__ = [
    "POLICIES",
    "Adam",
    "Arrival",
    "Average",
    "Barrier",
    "Clip",
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
    "Momentum",
    "Nesterov",
    "Pending",
    "Quorum",
    "Roster",
    "Samples",
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
