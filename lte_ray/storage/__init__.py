"""A run's directory on any filesystem that pyarrow or fsspec opens, with retries while storage fails."""

from __future__ import annotations

from lte_ray.storage.background import run_in_thread
from lte_ray.storage.filesystem import PART_SUFFIX, default_storage, split_run_path
from lte_ray.storage.lock import LOCK, Driver, check_unlocked, exclusive_lock, find_driver
from lte_ray.storage.ownership import LEASE
from lte_ray.storage.retry import pending_problem
from lte_ray.storage.run_directory import EMA_MODEL, FILES, MODEL, PROBE, RUN, RunDirectory

__all__ = [
    "EMA_MODEL",
    "FILES",
    "LEASE",
    "LOCK",
    "MODEL",
    "PART_SUFFIX",
    "PROBE",
    "RUN",
    "Driver",
    "RunDirectory",
    "check_unlocked",
    "default_storage",
    "exclusive_lock",
    "find_driver",
    "pending_problem",
    "run_in_thread",
    "split_run_path",
]
