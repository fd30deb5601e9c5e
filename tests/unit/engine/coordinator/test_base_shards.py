"""Merging spread over shards gives the bits of merging in one place, and refuses what that refuses in the same words."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lte_ray.config import MergeConfig
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.merging.registry import WEIGHT_POLICIES, make_policy
from tests.support.base_shards import HEADS, Whims, both, same
from tests.support.helpers import offer, random_flat


@given(
    st.lists(
        st.tuples(st.integers(0, HEADS - 1), st.sampled_from(["merge", "merge", "wait", "discard", "nan", "fresh"])),
        max_size=25,
    ),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from(["auto", "factors", "dense"]),
    st.sampled_from(["none", "B"]),
    st.integers(1, 4),
)
def test_spread_merging_has_the_bits_of_merging_in_one_place(
    events: list, transfer: str, topk: float, down: str, reset: str, shards: int
) -> None:
    """Any schedule, format and number of shards, unequal ranks: base, references, verdicts and records are equal."""
    merge = MergeConfig(transfer=transfer, replica_topk=topk, send_down=down, shards=shards)  # type: ignore[arg-type]
    one, spread = both(merge, [2, 3, 1], reset, Whims)
    incarnations = [0] * HEADS
    for sequence, (head, what) in enumerate(events, 1):
        if what == "fresh":
            if head not in one.pending_heads:
                incarnations[head] += 1
                assert one.join(head, incarnations[head], fresh=True)
                spread.begin_afresh(head, incarnations[head])
            continue
        one.policy.what = spread.coordinator.policy.what = what  # type: ignore[attr-defined]
        codec, plan = spread.codecs[head], one.plans[head]
        flat, reference = random_flat(plan.contribution.size, sequence).float(), one.reference(head)
        if what == "nan":
            flat[0] = float("nan")
        buffers, decoded = codec.encode(flat, reference)
        contribution = dataclasses.replace(offer(head, sequence, version=one.version), incarnation=incarnations[head])
        same(one.receive(contribution, decoded), spread.receive(contribution, buffers))
        assert torch.equal(one.base, spread.base())
    for index in range(len(spread.codecs[0].groups)):
        for head in range(HEADS):
            whole, held = one.reference(head), spread.reference(index, head)
            assert (held is None) == (whole is None)
            if whole is not None and held is not None:
                assert torch.equal(held, spread.codecs[head].slice_factors(index, whole))
    assert [shard.undecided for shard in spread.shards] == [len(one.pending_heads)] * shards


def test_shards_forget_the_reference_of_a_head_that_begins_afresh() -> None:
    """Its contribution counts from B = 0 there too: the bits of merging in one place."""
    one, spread = both(MergeConfig(shards=2), [2, 3, 1], "none", Whims)
    for sequence, incarnation in ((1, 0), (2, 1), (3, 1)):
        if sequence == 2:
            assert one.join(0, incarnation, fresh=True)
            spread.begin_afresh(0, incarnation)
            assert all(spread.reference(index, 0) is None for index in range(len(spread.codecs[0].groups)))
        buffers, decoded = spread.codecs[0].encode(
            random_flat(one.plans[0].contribution.size, sequence).float(), one.reference(0)
        )
        contribution = dataclasses.replace(offer(0, sequence, version=one.version), incarnation=incarnation)
        same(one.receive(contribution, decoded), spread.receive(contribution, buffers))
        assert torch.equal(one.base, spread.base())


@pytest.mark.parametrize("name", WEIGHT_POLICIES)
def test_built_in_policies_of_weights_need_no_tensors(name: str) -> None:
    """Barrier and arrival alike: the base is that of merging in one place."""
    for when in ("barrier", "arrival"):
        merge = MergeConfig(shards=3, policy=name, when=when)  # type: ignore[arg-type]
        one, spread = both(merge, [2, 2, 2], "none", lambda merge=merge: make_policy(merge))
        for sequence in range(1, 4):
            for head in (2, 0, 1):
                flat = random_flat(one.plan.contribution.size, 10 * sequence + head).float()
                buffers, decoded = spread.codecs[head].encode(flat, one.reference(head))
                contribution = offer(head, sequence, samples=4 + head)
                same(one.receive(contribution, decoded), spread.receive(contribution, buffers))
        assert one.version == (3 if when == "barrier" else 9)
        assert torch.equal(one.base, spread.base())


def test_what_is_asked_at_a_version_is_of_that_version_however_late_it_is_computed() -> None:
    """Merges that are queued after the question don't count, whichever thread catches up."""
    _, spread = both(MergeConfig(shards=2), [2, 2, 2], "none", Whims)
    asked, bases = [], []
    for sequence in range(1, 6):
        codec = spread.codecs[0]
        flat = random_flat(codec.plan.contribution.size, sequence).float()
        spread.receive(offer(0, sequence), codec.encode(flat, None)[0])
        for shard in spread.shards:
            asked += [(sequence, shard.schedule_read(i, lambda version, part, held: version)) for i in shard.groups]
        if sequence == 3:
            bases.append(
                [shard.schedule_read(i, lambda v, part, held: part.clone()) for shard in spread.shards for i in shard.groups]
            )
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(shard.catch_up) for shard in spread.shards for _ in range(2)]:
            done.result()
    assert [version for version, _ in asked] == [future.result() for _, future in asked]
    _, again = both(MergeConfig(shards=2), [2, 2, 2], "none", Whims)
    for sequence in range(1, 4):
        flat = random_flat(again.codecs[0].plan.contribution.size, sequence).float()
        again.receive(offer(0, sequence), again.codecs[0].encode(flat, None)[0])
    indices = [i for shard in spread.shards for i in shard.groups]
    expected = views(again.codecs[0].plan.base, again.base())
    for index, future in zip(indices, bases[0], strict=True):
        assert torch.equal(future.result(), gather(again.codecs[0].group_plans[index].base, expected))


def test_a_question_that_fails_harms_nobody_else() -> None:
    """Its asker is told; the base goes on."""
    _, spread = both(MergeConfig(shards=2), [2, 2, 2], "none", Whims)
    (shard, *_), index = spread.shards, spread.shards[0].groups[0]
    failing = shard.schedule_read(index, lambda version, part, held: 1 // version)
    after = shard.schedule_read(index, lambda version, part, held: version)
    shard.catch_up()
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert after.result() == 0
