"""The checksum that compares the bits of two bases."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.transfer.checksum import base_checksum
from tests.support.plans import random_flat


@given(st.integers(1, 200_000), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_a_checksum_sees_any_flipped_bit(size: int, which: int, dtype: torch.dtype) -> None:
    """A copy has the same checksum, those of pieces add up, and it has 64 bits."""
    flat = random_flat(size, 1, dtype)
    before = base_checksum(flat)
    assert 0 <= before < 2**64
    assert base_checksum(flat.clone()) == before
    assert (base_checksum(flat[: size // 3]) + base_checksum(flat[size // 3 :])) % 2**64 == before
    words = flat.view(torch.int32 if dtype == torch.float32 else torch.int64)
    bits = 8 * dtype.itemsize
    at, bit = which // bits % size, which % bits
    words[at] ^= 1 << bit if bit < bits - 1 else -(1 << bit)
    assert base_checksum(flat) != before


def test_a_checksum_sees_changes_that_cancel() -> None:
    """One element an ulp up and another one down, which a plain sum of the bits would miss; for 500 such pairs."""
    flat = random_flat(1000, 1, torch.float32)
    for at in range(500):
        other = flat.clone()
        other.view(torch.int32)[at] += 1
        other.view(torch.int32)[500 + at] -= 1
        assert base_checksum(other) != base_checksum(flat)
