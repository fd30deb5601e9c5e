"""Warnings about data, which many processes and batches would repeat."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(text: str) -> None:
    """Logs a warning, once in each process."""
    logging.getLogger("lte_ray").warning("%s", text)
