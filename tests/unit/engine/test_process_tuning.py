"""The allocator setting that heads train with."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from lte_ray.engine.process_tuning import keep_freed_memory, release_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_blocks_are_kept_for_the_next_step() -> None:
    """After the call a freed block of 24 MiB is reused with its pages: no new page faults."""
    import resource

    assert keep_freed_memory()
    size, libc = 24 << 20, ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

    def use() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    release_freed_memory()  # what earlier tests freed
    first, second = use(), use()
    assert first > 10 * max(1, second)


@pytest.mark.skipif(sys.platform == "linux", reason="elsewhere it does nothing")
def test_other_systems_are_unaffected() -> None:
    """Without glibc it has no effect."""
    assert not keep_freed_memory()
