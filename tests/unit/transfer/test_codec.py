"""The codec: round trips, rounding and sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer import packing
from lte_ray.transfer.checksum import base_checksum
from lte_ray.transfer.codec import min_contribution_bytes
from tests.support.codecs import FORMATS, large_codec, make_codec
from tests.support.plans import plan_from_shapes, random_flat

WIDTH = {"fp32": 4, "bf16": 2, "int8": 1}
BLOCK = 512

sizes = st.integers(1, 60)
plans = st.builds(
    plan_from_shapes,
    st.lists(st.tuples(sizes, sizes, st.integers(1, 12)), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), max_size=3),
    statistics=st.sets(st.integers(0, 2)),
)
merges = st.builds(
    MergeConfig,
    transfer=st.sampled_from(FORMATS),
    replica_topk=st.sampled_from([1.0, 0.5, 0.1, 0.01]),
    send_down=st.sampled_from(["auto", "dense", "factors"]),
)


STATISTICS_IN_ONE_OF_TWO_GROUPS = plan_from_shapes([(1, 1, 1), (2, 3, 1)], [(), (3,)], statistics={0})
EMPTY_STATISTICS = plan_from_shapes([(1, 1, 1)], [(0,), (2, 0), (3,)], statistics={0})


@given(plans, merges, st.integers(1, 4), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@example(STATISTICS_IN_ONE_OF_TWO_GROUPS, MergeConfig(), 1, False, torch.float32)
@example(STATISTICS_IN_ONE_OF_TWO_GROUPS, MergeConfig(transfer="bf16"), 2, True, torch.float32)
@example(EMPTY_STATISTICS, MergeConfig(transfer="bf16"), 1, False, torch.float32)
@example(EMPTY_STATISTICS, MergeConfig(), 1, True, torch.float64)
def test_the_receiver_decodes_what_the_sender_says(
    plan: Plan, merge: MergeConfig, shards: int, has_reference: bool, dtype: torch.dtype
) -> None:
    """All groups at once or one by one, bit for bit, and close to the contribution; buffers have the declared sizes."""
    codec = make_codec(plan, replace(merge, shards=min(shards, len(plan.adapted))), dtype)
    contribution = random_flat(plan.contribution.size, 1, dtype)
    reference = random_flat(plan.factors_size, 2, dtype) if has_reference else None
    kept = contribution.clone()
    buffers, decoded = codec.encode(contribution, reference)
    assert torch.equal(contribution, kept)
    assert [b.numel() for b in buffers] == list(codec.buffer_sizes)
    assert all(b.dtype == torch.uint8 and b.is_contiguous() for b in buffers)
    assert torch.equal(codec.decode(dict(enumerate(buffers)), reference), decoded)
    for index, buffer in enumerate(buffers):
        old = None if reference is None else codec.slice_factors(index, reference)
        assert torch.equal(codec.decode_group(index, buffer, old), codec.slice_contribution(index, decoded))
    factors = slice(plan.factors_size)
    change = contribution[factors] - (0 if reference is None else reference[factors])
    worst = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 1 / 254}[merge.transfer] * float(change.abs().max())
    for replica in plan.replicas:
        (entry,) = [e for e in plan.contribution.entries if e.name == replica.name]
        at = slice(entry.offset, entry.offset + entry.size)
        assert not replica.buffer or torch.equal(decoded[at], contribution[at]), "running statistics are exact"
    slack = 2 * float(contribution.abs().max()) * torch.finfo(torch.float32).eps  # the reference's own roundings
    assert float((decoded[factors] - contribution[factors]).abs().max()) <= worst + slack


@given(plans, st.sampled_from([torch.float32, torch.float64]))
def test_fp32_is_exact_and_copies_nothing(plan: Plan, dtype: torch.dtype) -> None:
    """Decoding returns the contribution, with one group in the same memory; float64 stays float64."""
    codec = make_codec(plan, MergeConfig(send_down="dense"), dtype)
    contribution = random_flat(plan.contribution.size, 1, dtype)
    buffers, decoded = codec.encode(contribution, random_flat(plan.factors_size, 2, dtype))
    assert decoded.data_ptr() == contribution.data_ptr()
    again = codec.decode(dict(enumerate(buffers)), None)
    assert torch.equal(again, contribution)
    assert again.data_ptr() == contribution.data_ptr()


@given(st.integers(1, 1500), st.floats(-30, 30), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_int8_is_wrong_by_at_most_half_a_step(size: int, power: float, dtype: torch.dtype, has_zero_block: bool) -> None:
    """|error| <= largest magnitude of the block / 254, up to the rounding of the step and of the product."""
    codec = make_codec(plan_from_shapes([(1, 1, 1)], [(size,)]), MergeConfig(transfer="int8", send_down="dense"), dtype)
    contribution = random_flat(2 + size, 3, dtype) * 10**power
    if has_zero_block:
        contribution[2 : 2 + BLOCK] = 0
    _, decoded = codec.encode(contribution, None)
    for x, y in zip(contribution[2:].split(BLOCK), decoded[2:].split(BLOCK), strict=True):
        scale = float(x.abs().max())
        assert float((x - y).abs().max()) <= scale / 254 * (1 + 2**-14)  # 127 x 2^-23, twice
        assert float(y.abs().max()) == pytest.approx(scale, rel=2**-22)  # the largest is at code 127


@pytest.mark.parametrize("transfer", ["bf16", "int8"])
def test_pieces_that_fit_a_cache_change_no_bit(transfer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several chunks and a remainder are rounded as in one chunk."""
    codec = make_codec(plan_from_shapes([(300, 400, 200)], [(1000,)]), MergeConfig(transfer=transfer))
    contribution = random_flat(codec.plan.contribution.size, 4, torch.float32)
    reference = random_flat(codec.plan.factors_size, 5, torch.float32)
    assert codec.plan.factors_size > 2 * packing.CHUNK
    buffers, decoded = codec.encode(contribution, reference)
    monkeypatch.setattr(packing, "CHUNK", 1 << 30)
    again, in_one = codec.encode(contribution, reference)
    assert all(torch.equal(a, b) for a, b in zip(buffers, again, strict=True))
    assert torch.equal(decoded, in_one)


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [0.01, 0.1, 0.5])
def test_topk_carries_the_largest_changes(transfer: str, topk: float) -> None:
    """The fraction with the largest |value| arrives, rounded, in fp32 exactly; the others are zero."""
    codec = large_codec(transfer, topk)
    begin = codec.plan.factors_size
    contribution = random_flat(codec.plan.contribution.size, 4, torch.float32)
    _, decoded = codec.encode(contribution, None)
    replicas, came = contribution[begin:], decoded[begin:] != 0
    assert int(came.sum()) == round(topk * len(replicas))
    assert float(replicas[came].abs().min()) >= float(replicas[~came].abs().max())
    if transfer == "fp32":
        assert torch.equal(decoded[begin:][came], replicas[came])


def test_the_largest_of_many_are_found_exactly() -> None:
    """Also if a sample preselects the candidates, wherever they are, with ties and NaN."""
    plan = plan_from_shapes([(1, 1, 1)], [(400_000,)])
    codec = make_codec(plan, MergeConfig(replica_topk=0.001))
    normal, heavy = random_flat(plan.contribution.size, 5, torch.float32), random_flat(plan.contribution.size, 6, torch.float32)
    heavy[2::25] *= 1000  # just those that are the sample, which then suggests too high a bound
    for contribution in (normal, heavy, normal.sign()):
        _, decoded = codec.encode(contribution, None)
        sent = decoded[2:][decoded[2:] != 0].abs().sort().values
        assert torch.equal(sent, contribution[2:].abs().topk(400, sorted=True).values.flip(0))
    normal[100_002] = math.nan
    assert bool(codec.encode(normal, None)[1][100_002].isnan())


@given(plans, merges)
def test_sizes_are_those_of_the_formula(plan: Plan, merge: MergeConfig) -> None:
    """Values x width, a step per block of each weight and of the replicas, 4 bytes per index or one bit per element.

    Running statistics take 4 bytes each.
    """
    codec = make_codec(plan, merge)
    statistics = sum(math.prod(replica.shape) for replica in plan.replicas if replica.buffer)
    replicas = plan.contribution.size - plan.factors_size - statistics
    count = min(replicas, max(1, round(merge.replica_topk * replicas)))
    where = min(4 * count, math.ceil(replicas / 8))
    if count * WIDTH[merge.transfer] + where >= replicas * WIDTH[merge.transfer]:
        count, where = replicas, 0
    steps = [math.ceil(a.rank * sum(a.matrix) / BLOCK) for a in plan.adapted] + [math.ceil(count / BLOCK)]
    least = (plan.factors_size + count) * WIDTH[merge.transfer] + where + 4 * statistics
    assert min_contribution_bytes(plan, merge) == least
    assert sum(codec.buffer_sizes) == least + 4 * sum(steps) * (merge.transfer == "int8")


def test_int8_costs_less_than_one_percent_more_than_its_values() -> None:
    """On GPT-2's shapes at rank 32."""
    plan = plan_from_shapes([(2304, 768, 32), (768, 768, 32), (3072, 768, 32), (768, 3072, 32)] * 12, [(102_144,)])
    for topk in (1.0, 0.1, 0.01):
        merge = MergeConfig(transfer="int8", replica_topk=topk)
        assert sum(make_codec(plan, merge).buffer_sizes) <= 1.01 * min_contribution_bytes(plan, merge)


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.5])
def test_buffers_and_contributions_may_lie_anywhere(transfer: str, topk: float) -> None:
    """Unaligned or strided memory, as in a message, has the same values."""
    codec = large_codec(transfer, topk)
    contribution = random_flat(codec.plan.contribution.size, 4, torch.float32)
    (buffer,), decoded = codec.encode(contribution, None)
    moved = torch.cat([buffer.new_zeros(3), buffer])[3:]
    spread = torch.stack([buffer, buffer], dim=1)[:, 0]
    for other in (moved, spread):
        assert torch.equal(codec.decode({0: other}, None), decoded)
    assert torch.equal(codec.encode(torch.stack([contribution] * 2, dim=1)[:, 0], None)[1], decoded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.01])
def test_a_gpu_sends_the_same_bytes(transfer: str, topk: float) -> None:
    """Encoding, decoding and checksums have the same bits as on a CPU."""
    codec = large_codec(transfer, topk)
    contribution = random_flat(codec.plan.contribution.size, 4, torch.float32)
    reference = random_flat(codec.plan.factors_size, 5, torch.float32)
    (here,), decoded = codec.encode(contribution, reference)
    (there,), on_gpu = codec.encode(contribution.cuda(), reference.cuda())
    assert torch.equal(here, there.cpu())
    assert torch.equal(decoded, on_gpu.cpu())
    assert base_checksum(on_gpu) == base_checksum(decoded)
