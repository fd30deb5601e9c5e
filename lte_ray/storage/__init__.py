"""A run's directory on any filesystem that pyarrow or fsspec opens, with retries while storage fails."""

from __future__ import annotations

from lte_ray.storage.background import run_in_thread
from lte_ray.storage.filesystem import PART_SUFFIX, split_run_path
from lte_ray.storage.lock import LOCK, check_unlocked, exclusive_lock
from lte_ray.storage.retry import pending_problem
from lte_ray.storage.run_directory import EMA_MODEL, FILES, MODEL, PROBE, RUN, RunDirectory

__all__ = [
    "EMA_MODEL",
    "FILES",
    "LOCK",
    "MODEL",
    "PART_SUFFIX",
    "PROBE",
    "RUN",
    "RunDirectory",
    "check_unlocked",
    "exclusive_lock",
    "pending_problem",
    "run_in_thread",
    "split_run_path",
]
