"""How many threads torch computes with, set on purpose: results depend on it in the last bits, and speed a lot.

How a head's process keeps memory: freed blocks stay with it, to be used again in the next step.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lte_ray.layout import Plan

MAX_REDO_THREADS = 4
"""Threads that merge at most where heads redo merges: the same on every machine, as results depend on it in the last bits."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def merge_threads(configured: int, plan: Plan, num_heads: int, limit: int = 0) -> int:
    """Threads to merge with: as configured, or one for every 10^9 operations of a merge, up to `most` (0: one per core).

    A small merge is over before a second thread pays; what that thread then costs the heads, by waiting actively for more
    work, is more than the whole merge (measured: a local step of a small model took 1.4 times as long).
    """
    if configured:
        return configured
    operations = sum(2 * math.prod(a.shape) * 2 * a.rank * num_heads for a in plan.adapted)
    return max(1, min(limit or available_cores(), operations // 10**9))


def head_threads(configured: int, cpus: float, heads: int = 1) -> tuple[int, int]:
    """Heads of one process that train at the same time, and the threads of each.

    Threads are as configured, or the whole CPUs shared out over the heads, at least 1; as many heads train at once as there are
    CPUs for.
    """
    whole = max(1, int(cpus))
    threads = configured or max(1, whole // heads)
    return max(1, min(heads, whole // threads)), threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch uses `count` threads for one operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_THRESHOLD = 1 << 30
OLD_GLIBC_LIMIT = 32 << 20  # older glibc takes no more


def keep_freed_memory() -> bool:
    """Has glibc's allocator keep what a step frees, rather than give it to the kernel and fault it in anew.

    Every step of a model on a CPU allocates the same blocks again; by default each of more than 128 KiB to 32 MiB is
    mapped and unmapped every time, and more so in threads other than the main one, where Ray runs actors' methods.
    Measured on the GPT worker: 4% more steps a second. The process holds no more than its peak.

    Returns:
        Whether it took effect (Linux with glibc).
    """
    if sys.platform != "linux":
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, LARGE_THRESHOLD) or mallopt(M_MMAP_THRESHOLD, OLD_GLIBC_LIMIT)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGE_THRESHOLD) and mapped)


def release_freed_memory() -> bool:
    """Gives the kernel what was freed so far: once, when a head is built, which takes more than it goes on to need.

    Returns:
        Whether it took effect (Linux with glibc).
    """
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))
