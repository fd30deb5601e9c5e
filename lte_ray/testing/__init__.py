"""For authors of merge policies: `check_policy` tests whether a policy meets the requirements for all policies."""

from lte_ray.testing.kit import check_policy

__all__ = ["check_policy"]
