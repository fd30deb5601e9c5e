"""How many threads torch computes with, set on purpose: results depend on it in the last bits, and speed a lot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def merge_threads(configured: int) -> int:
    """Threads to merge with: as configured, or one per core."""
    return configured or cores()


def head_threads(configured: int, cpus: float) -> int:
    """Threads of a head: as configured, or as many as it has whole CPUs, at least 1."""
    return configured or max(1, int(cpus))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch uses `count` threads for one operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
