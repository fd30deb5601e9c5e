"""Tries a worker out in one process, and says what is wrong with it: `lte_ray.check`, and ``lte-ray check``."""

from lte_ray.checking.api import check, check_run
from lte_ray.checking.report import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "check", "check_run"]
