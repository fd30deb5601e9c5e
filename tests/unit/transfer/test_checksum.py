"""The checksum that verifies a contribution's buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lte_ray.transfer.checksum import buffers_checksum, verify_checksums
from tests.support.codecs import FORMATS, large_codec
from tests.support.plans import random_flat

TYPES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


def filled(size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Returns random bytes as elements of this type, including NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from(TYPES))
def test_a_checksum_detects_any_flipped_bit(sizes: list[int], which: int, dtype: torch.dtype) -> None:
    """In any buffer of any type; a copy has the same checksum, which has 32 bits; buffers aren't modified."""
    buffers = [filled(size, dtype, seed) for seed, size in enumerate([*sizes, 1])]
    copies = [buffer.clone() for buffer in buffers]
    before = buffers_checksum(buffers)
    assert 0 <= before < 2**32
    assert buffers_checksum(copies) == before
    flipped = copies[which % len(copies)]
    if flipped.numel():
        flipped.view(torch.uint8)[which // 8 % (flipped.numel() * dtype.itemsize)] ^= 1 << which % 8
        assert buffers_checksum(copies) != before


@pytest.mark.parametrize("dtype", TYPES)
def test_a_checksum_detects_order_ends_and_types(dtype: torch.dtype) -> None:
    """Swapped or missing buffers, swapped elements, shorter and longer buffers, another boundary or type."""
    a, b = filled(100, dtype, 1), filled(100, dtype, 2)
    others = [
        [b, a],
        [a],
        [a, b, a[:0]],
        [a, b[:-1]],
        [a, b[1:]],
        [torch.cat([a, b])],
        [torch.cat([a, b[:1]]), b[1:]],
        [a.flip(0), b],
        [a.view(torch.uint8), b] if dtype != torch.uint8 else [a.view(torch.int8), b],
    ]
    assert len({buffers_checksum(each) for each in [[a, b], *others]}) == len(others) + 1


def test_a_checksum_detects_zeros() -> None:
    """Buffers of zeros, as a crashed transfer leaves them, have a different checksum for each length."""
    assert len({buffers_checksum([torch.zeros(size, dtype=torch.uint8)]) for size in range(1000)}) == 1000


def test_a_checksum_depends_on_bytes_not_on_memory_layout() -> None:
    """For views with gaps, and views with an offset in memory."""
    whole = filled(200, torch.float32)
    assert buffers_checksum([whole[::2]]) == buffers_checksum([whole[::2].clone()])
    assert buffers_checksum([whole[1:]]) == buffers_checksum([whole[1:].clone()])


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.05])
def test_checksums_of_contributions_in_every_format(transfer: str, topk: float) -> None:
    """For a codec's buffers, by group: equal buffers have equal checksums; one changed byte in any group changes them."""
    codec = large_codec(transfer, topk)
    flat = random_flat(codec.plan.contribution.size, 1, torch.float32)
    buffers, _ = codec.encode(flat, None)
    before = buffers_checksum(buffers)
    assert buffers_checksum(codec.encode(flat.clone(), None)[0]) == before
    for index in range(len(buffers)):
        changed = [buffer.clone() for buffer in buffers]
        changed[index][-1] ^= 1
        assert buffers_checksum(changed) != before


def test_each_buffer_is_compared_with_its_own_checksum() -> None:
    """Intact buffers pass; the error names the first one that was changed or swapped."""
    buffers = [filled(50, torch.uint8, seed) for seed in range(3)]
    checksums = [buffers_checksum([buffer]) for buffer in buffers]
    verify_checksums(buffers, checksums)
    verify_checksums([], [])
    changed = buffers[1].clone()
    changed[7] ^= 16
    told = rf"buffer 1 didn't arrive as it was sent \(checksum {buffers_checksum([changed]):08x}, expected {checksums[1]:08x}\)"
    with pytest.raises(ValueError, match=told):
        verify_checksums([buffers[0], changed, buffers[2]], checksums)
    with pytest.raises(ValueError, match="buffer 0 didn't arrive"):
        verify_checksums([buffers[1], buffers[0], buffers[2]], checksums)
    verify_checksums([changed], [])  # of a sender that makes none


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_checksum_on_a_gpu_is_the_same() -> None:
    """Its bytes are copied to the CPU."""
    whole = filled(1000, torch.uint8)
    assert buffers_checksum([whole.cuda()]) == buffers_checksum([whole])
