"""Settings of a process that decide its speed: how many threads torch uses, and what happens to freed memory.

The number of threads is always set explicitly: results depend on it in the last bits.
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
"""The most threads that merge where heads redo merges. It is the same on every machine, since results depend on it."""


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def merge_threads(configured: int, plan: Plan, num_heads: int, limit: int = 0) -> int:
    """Threads to merge with: as configured, or one for every 10^9 operations of a merge, up to `limit` (0: one per core).

    A small merge ends before a second thread helps. That thread then waits actively for more work, which costs the heads more
    than the merge itself (measured: a local step of a small model took 1.4 times as long).
    """
    if configured:
        return configured
    operations = sum(2 * math.prod(a.shape) * 2 * a.rank * num_heads for a in plan.adapted)
    return max(1, min(limit or available_cores(), operations // 10**9))


def head_threads(configured: int, cpus: float, heads: int = 1) -> tuple[int, int]:
    """Returns how many heads of one process train concurrently, and the threads of each.

    The threads are as configured, or the complete CPUs divided by the heads, at least 1. As many heads train concurrently as
    there are CPUs for.
    """
    complete = max(1, int(cpus))
    threads = configured or max(1, complete // heads)
    return max(1, min(heads, complete // threads)), threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch uses `count` threads for each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_THRESHOLD = 1 << 30
OLD_GLIBC_LIMIT = 32 << 20  # older glibc accepts no more


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep what a step frees, rather than return it to the kernel and fault it in again.

    Every step of a model on a CPU allocates the same blocks again. By default each block above a limit of 128 KiB to 32 MiB is
    mapped and unmapped every time, more so in threads other than the main one, where Ray runs actors' methods.
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
    """Returns freed memory to the kernel; called once a head is built, which takes more memory than the head needs later.

    Returns:
        Whether it took effect (Linux with glibc).
    """
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))
