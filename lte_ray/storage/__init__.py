"""A run's folder, on any filesystem that pyarrow or fsspec knows, and patience with storage that fails for a while."""

from __future__ import annotations

from lte_ray.storage.background import run_in_thread
from lte_ray.storage.filesystem import PART, parted
from lte_ray.storage.lock import LOCK, alone, check_alone
from lte_ray.storage.retry import trouble
from lte_ray.storage.run_directory import PROBE, RUN, RunDirectory

__all__ = ["LOCK", "PART", "PROBE", "RUN", "RunDirectory", "alone", "check_alone", "parted", "run_in_thread", "trouble"]
