"""An audit of a run by its ``metrics.jsonl``: was each contribution, and each batch of the data, merged exactly once?"""

from __future__ import annotations

from lte_ray.audit.found import Audit
from lte_ray.audit.judge import audit
from lte_ray.audit.rows import read_rows

__all__ = ["Audit", "audit", "read_rows"]
