"""For authors of merge policies: `check_policy` runs a policy through what every policy must hold to."""

from lte_ray.testing.kit import check_policy

__all__ = ["check_policy"]
