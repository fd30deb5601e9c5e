"""Invalid contributions: malformed buffers are refused, and rounding never hides non-finite values."""

from __future__ import annotations

import math

import pytest
import torch

from lte_ray.config.merge import MergeConfig
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import EntryGroup
from tests.support.codecs import FORMATS, large_codec, make_codec
from tests.support.plans import plan_from_shapes, random_flat


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.01])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5, -1])
def test_non_finite_stays_non_finite(transfer: str, topk: float, value: float, at: int) -> None:
    """In a factor or a replica change, with and without a reference: the receiver can detect and refuse it."""
    codec = large_codec(transfer, topk)
    contribution = random_flat(codec.plan.contribution.size, 7, torch.float32)
    contribution[at] = value
    for reference in (None, random_flat(codec.plan.factors_size, 8, torch.float32)):
        assert not bool(codec.encode(contribution, reference)[1].isfinite().all())


def test_float64_beyond_float32_comes_out_non_finite() -> None:
    """A value beyond the range of a step or of bf16 isn't clipped silently."""
    plan = plan_from_shapes([(4, 4, 1)], [(3,)])
    for transfer in ("bf16", "int8"):
        contribution = random_flat(plan.contribution.size, 7)
        contribution[0] = 1e300
        assert not bool(
            make_codec(plan, MergeConfig(transfer=transfer), torch.float64).encode(contribution, None)[1].isfinite().all()
        )


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.01])
def test_malformed_buffers_are_refused(transfer: str, topk: float) -> None:
    """The error names a wrong length, type or shape and the expected one; nothing is read beyond the end."""
    codec = large_codec(transfer, topk)
    (buffer,), _ = codec.encode(random_flat(codec.plan.contribution.size, 4, torch.float32), None)
    longer = torch.cat([buffer, buffer[:1]])
    for bad in (buffer[:-1], longer, buffer[:0], buffer.view(1, -1), buffer.to(torch.int8)):
        for decode in (lambda b: codec.decode({0: b}, None), lambda b: codec.decode_group(0, b, None)):
            with pytest.raises(ValueError, match=rf"expected a contribution's buffer of {len(buffer)} bytes.*found shape"):
                decode(bad)


@pytest.mark.parametrize("index", [-1, 1305, 2**31 - 1])
def test_indices_out_of_range_are_refused(index: int) -> None:
    """First or last, they never reach the tensor; neither do repeated ones."""
    codec = large_codec("fp32", 0.01)
    (buffer,), _ = codec.encode(random_flat(codec.plan.contribution.size, 4, torch.float32), None)
    indices = buffer[-4 * 13 :].view(torch.int32)
    assert bool((indices[1:] > indices[:-1]).all())
    for at, value in ((0, index), (-1, index), (1, int(indices[0]))):
        bad = buffer.clone()
        bad[-4 * 13 :].view(torch.int32)[at] = value
        with pytest.raises(ValueError, match="13 ascending indices of replica elements below 1305"):
            codec.decode({0: bad}, None)


def test_wrong_bitmaps_are_refused() -> None:
    """One bit too many or too few, no bit, and one beyond the last element."""
    codec = large_codec("int8", 0.5)
    (buffer,), _ = codec.encode(random_flat(codec.plan.contribution.size, 4, torch.float32), None)
    bitmap = buffer[-164:]
    beyond = bitmap.clone()
    lowest = int(beyond[0]) & -int(beyond[0])
    beyond[0], beyond[-1] = int(beyond[0]) - lowest, int(beyond[-1]) | 128  # 1305 = 163 x 8 + 1
    for wrong in (bitmap ^ torch.eye(164, dtype=torch.uint8)[0], torch.zeros_like(bitmap), beyond):
        with pytest.raises(ValueError, match="expected 652 replica elements below 1305, found"):
            codec.decode({0: torch.cat([buffer[:-164], wrong])}, None)


def test_other_sizes_and_groups_are_refused() -> None:
    """A contribution or reference of another plan or type, a missing buffer, groups that don't match the plan."""
    codec = large_codec("int8")
    whole = random_flat(codec.plan.contribution.size, 4, torch.float32)
    buffers, _ = codec.encode(whole, None)
    with pytest.raises(ValueError, match="expected a flat contribution of"):
        codec.encode(whole[1:], None)
    with pytest.raises(ValueError, match=r"expected a flat contribution of .* of torch.float32, found .* torch.float64"):
        codec.encode(whole.double(), None)
    for call in (lambda r: codec.encode(whole, r), lambda r: codec.decode({0: buffers[0]}, r)):
        with pytest.raises(ValueError, match="expected a flat reference of"):
            call(whole)
    with pytest.raises(ValueError, match=r"groups 0 to 0, found \[\]"):
        codec.decode({}, None)
    names = codec.groups[0].names
    for wrong in ([names[:-1]], [names, names[:1]]):
        with pytest.raises(ValueError, match="each entry of the base once"):
            Codec(codec.plan, [EntryGroup(n, 0, False) for n in wrong], MergeConfig())
    with pytest.raises(ValueError, match="all replicas must be in one group"):
        Codec(codec.plan, [EntryGroup(names[:-1], 0, False), EntryGroup(names[-1:], 1, False)], MergeConfig())
