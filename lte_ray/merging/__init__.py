"""Merging: the arithmetic on low-rank products, and the policies that decide what is merged."""

from lte_ray.merging.average import Average
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Wait
from lte_ray.merging.registry import POLICIES

__all__ = [
    "POLICIES",
    "Average",
    "Decision",
    "Discard",
    "Merge",
    "MergeChange",
    "MergePolicy",
    "Pending",
    "Roster",
    "Wait",
]
