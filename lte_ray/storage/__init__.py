"""A run's folder, on any filesystem that pyarrow or fsspec knows, and patience with storage that fails for a while."""

from __future__ import annotations

from lte_ray.storage.beside import beside
from lte_ray.storage.directory import PROBE, RUN, RunDirectory
from lte_ray.storage.lock import LOCK, alone, check_alone
from lte_ray.storage.patience import trouble
from lte_ray.storage.places import parted
from lte_ray.storage.tries import PART

__all__ = ["LOCK", "PART", "PROBE", "RUN", "RunDirectory", "alone", "beside", "check_alone", "parted", "trouble"]
