"""Merging in shards is bitwise equal to merging in one process, and refuses the same with the same reasons."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from lte_ray.config import MergeConfig
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.merging.registry import WEIGHT_POLICIES, make_policy
from tests.support.base_shards import HEADS, Scripted, assert_same, assert_same_momentum, make_both
from tests.support.plans import make_contribution, random_flat


@example([(0, "nan"), (0, "nan"), (1, "wait"), (0, "nan")], "fp32", 1.0, "auto", "none", 1)  # a quarantine lets 1 merge
@given(
    st.lists(
        st.tuples(st.integers(0, HEADS - 1), st.sampled_from(["merge", "merge", "step", "wait", "discard", "nan", "fresh"])),
        max_size=25,
    ),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from(["auto", "factors", "dense", "bf16", "int8"]),
    st.sampled_from(["none", "B"]),
    st.integers(1, 4),
)
def test_sharded_merging_is_bitwise_equal_to_local_merging(
    events: list, transfer: str, topk: float, down: str, reset: str, shards: int
) -> None:
    """For any schedule, format and number of shards, with unequal ranks: base, momentum, references, results and records."""
    # Without the outlier filter: in a sharded run, heads compute the norms for it, and there are no heads here.
    merge = MergeConfig(transfer=transfer, replica_topk=topk, send_down=down, shards=shards, max_norm_z=0)  # type: ignore[arg-type]
    local, sharded = make_both(merge, [2, 3, 1], reset, Scripted)
    incarnations = [0] * HEADS
    for sequence, (head, what) in enumerate(events, 1):
        if what == "fresh":
            if head not in local.pending_heads:
                incarnations[head] += 1
                assert local.join(head, incarnations[head], fresh=True)
                sharded.restart_fresh(head, incarnations[head])
            continue
        local.policy.next_decision = sharded.coordinator.policy.next_decision = what  # type: ignore[attr-defined]
        codec, plan = sharded.codecs[head], local.plans[head]
        flat, reference = random_flat(plan.contribution.size, sequence).float(), local.reference(head)
        if what == "nan":
            flat[0] = float("nan")
        buffers, decoded = codec.encode(flat, reference)
        contribution = dataclasses.replace(
            make_contribution(head, sequence, version=local.version), incarnation=incarnations[head]
        )
        assert_same(local.receive(contribution, decoded), sharded.receive(contribution, buffers))
        assert torch.equal(local.base, sharded.base())
        assert_same_momentum(local, sharded)
    for index in range(len(sharded.codecs[0].groups)):
        for head in local.members:  # a quarantined head may leave its reference in the shards
            expected, actual = local.reference(head), sharded.reference(index, head)
            assert (actual is None) == (expected is None)
            if expected is not None and actual is not None:
                assert torch.equal(actual, sharded.codecs[head].slice_factors(index, expected))
    assert [shard.undecided for shard in sharded.shards] == [len(local.pending_heads)] * shards


def test_shards_forget_the_reference_of_a_head_that_restarts_fresh() -> None:
    """Its contribution is relative to B = 0 there, too."""
    local, sharded = make_both(MergeConfig(shards=2), [2, 3, 1], "none", Scripted)
    for sequence, incarnation in ((1, 0), (2, 1), (3, 1)):
        if sequence == 2:
            assert local.join(0, incarnation, fresh=True)
            sharded.restart_fresh(0, incarnation)
            assert all(sharded.reference(index, 0) is None for index in range(len(sharded.codecs[0].groups)))
        buffers, decoded = sharded.codecs[0].encode(
            random_flat(local.plans[0].contribution.size, sequence).float(), local.reference(0)
        )
        contribution = make_contribution(0, sequence, version=local.version, incarnation=incarnation)
        assert_same(local.receive(contribution, decoded), sharded.receive(contribution, buffers))
        assert torch.equal(local.base, sharded.base())


@pytest.mark.parametrize("name", WEIGHT_POLICIES)
def test_built_in_weight_policies_need_no_tensors(name: str) -> None:
    """The base is that of local merging, with a barrier and on arrival."""
    for when in ("barrier", "arrival"):
        merge = MergeConfig(shards=3, policy=name, when=when)  # type: ignore[arg-type]
        local, sharded = make_both(merge, [2, 2, 2], "none", lambda merge=merge: make_policy(merge))
        for sequence in range(1, 4):
            for head in (2, 0, 1):
                flat = random_flat(local.plan.contribution.size, 10 * sequence + head).float()
                buffers, decoded = sharded.codecs[head].encode(flat, local.reference(head))
                contribution = make_contribution(head, sequence, samples=4 + head)
                assert_same(local.receive(contribution, decoded), sharded.receive(contribution, buffers))
        assert local.version == (3 if when == "barrier" else 9)
        assert torch.equal(local.base, sharded.base())
        assert_same_momentum(local, sharded)


def test_a_read_is_of_the_version_at_which_it_was_scheduled() -> None:
    """Merges queued later don't count, whichever thread catches up."""
    _, sharded = make_both(MergeConfig(shards=2), [2, 2, 2], "none", Scripted)
    versions, bases = [], []
    for sequence in range(1, 6):
        codec = sharded.codecs[0]
        flat = random_flat(codec.plan.contribution.size, sequence).float()
        sharded.receive(make_contribution(0, sequence), codec.encode(flat, None)[0])
        for shard in sharded.shards:
            versions += [(sequence, shard.schedule_read(i, lambda newest: newest.version)) for i in shard.groups]
        if sequence == 3:
            bases.append(
                [shard.schedule_read(i, lambda newest: newest.base.clone()) for shard in sharded.shards for i in shard.groups]
            )
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(shard.catch_up) for shard in sharded.shards for _ in range(2)]:
            done.result()
    assert [version for version, _ in versions] == [future.result() for _, future in versions]
    _, again = make_both(MergeConfig(shards=2), [2, 2, 2], "none", Scripted)
    for sequence in range(1, 4):
        flat = random_flat(again.codecs[0].plan.contribution.size, sequence).float()
        again.receive(make_contribution(0, sequence), again.codecs[0].encode(flat, None)[0])
    indices = [i for shard in sharded.shards for i in shard.groups]
    expected = views(again.codecs[0].plan.base, again.base())
    for index, future in zip(indices, bases[0], strict=True):
        assert torch.equal(future.result(), gather(again.codecs[0].group_plans[index].base, expected))


def test_a_read_that_fails_concerns_only_its_caller() -> None:
    """Its future fails; later reads succeed."""
    _, sharded = make_both(MergeConfig(shards=2), [2, 2, 2], "none", Scripted)
    (shard, *_), index = sharded.shards, sharded.shards[0].groups[0]
    failing = shard.schedule_read(index, lambda newest: 1 // newest.version)
    after = shard.schedule_read(index, lambda newest: newest.version)
    shard.catch_up()
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert after.result() == 0
