"""An audit of a run by its ``metrics.jsonl``: was each contribution, and each batch of the data, merged exactly once?"""

from __future__ import annotations

from lte_ray.audit.checks import audit
from lte_ray.audit.reader import Audit, read_rows

__all__ = ["Audit", "audit", "read_rows"]
