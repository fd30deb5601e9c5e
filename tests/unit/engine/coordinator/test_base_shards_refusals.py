"""A coordinator with shards refuses the same as a local one, with the same reasons; and policies that need tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lte_ray.config import MergeConfig
from lte_ray.errors import ConfigError, PolicyError
from lte_ray.merging import Decision, Merge, MergeChange, Pending, Roster, Try, Wait, combine
from lte_ray.merging.registry import POLICIES, WEIGHT_POLICIES, make_policy
from lte_ray.messages import Contribution
from tests.support.base_shards import HEADS, Scripted, assert_same, make_both
from tests.support.plans import make_contribution, random_flat


@pytest.mark.parametrize("name", sorted(set(POLICIES) - set(WEIGHT_POLICIES)))
def test_built_in_policies_that_need_tensors_are_refused_before_a_run(name: str) -> None:
    """The error names the policy and what to change; --shards 1 is allowed."""
    make_policy(MergeConfig(policy=name))
    with pytest.raises(ConfigError, match=rf"--policy {name} .*needs --shards 1, but --shards is 2\.") as caught:
        make_policy(MergeConfig(policy=name, shards=2))
    assert "average, samples, stale" in str(caught.value)


class ReadsTensors:
    """Calls a function of the pending contributions."""

    def __init__(self, what: Callable[[Sequence[Pending], Roster], Any]) -> None:
        self.what = what

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return self.what(pending, roster) if pending else Wait()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda p, r: p[0].norm(), "looked at the tensors"),
        (lambda p, r: p[0].change(), "looked at the tensors"),
        (lambda p, r: p[0].part("w0"), "looked at the tensors"),
        (lambda p, r: combine(p, {p[0].head: 1.0}), "looked at the tensors"),
        (lambda p, r: p[0].share.reference, "looked at the tensors"),
        (lambda p, r: MergeChange(torch.zeros(r.layout.size), [p[0].head]), "decided a MergeChange"),
        (lambda p, r: Try(Merge({p[0].head: 1.0}), lambda values: Merge({})), "decided a Try"),
    ],
)
def test_a_policy_that_reads_tensors_needs_one_shard(what: Callable, reason: str) -> None:
    """The error names the policy and what it did; nothing is merged."""
    _, sharded = make_both(MergeConfig(shards=2), [2, 2], "none", lambda: ReadsTensors(what))
    buffers, _ = sharded.codecs[0].encode(random_flat(sharded.codecs[0].plan.contribution.size, 1).float(), None)
    with pytest.raises(PolicyError, match=rf"The merge policy ReadsTensors {reason}.*needs --shards 1, but --shards is 2"):
        sharded.receive(make_contribution(0), buffers)
    assert sharded.coordinator.version == 0


BAD: dict[str, tuple[Contribution, float | None]] = {
    "another run": (make_contribution(1, run="other"), None),
    "unknown head": (make_contribution(7), None),
    "repeat": (make_contribution(0), None),
    "stale incarnation": (make_contribution(0, 9, incarnation=-1), None),
    "undecided": (make_contribution(0, 2), None),
    "too new": (make_contribution(1, version=1), None),
    "NaN": (make_contribution(1), float("nan")),
    "infinite": (make_contribution(1), float("-inf")),
    "absurdly large": (make_contribution(1), 1e16),
}


@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.parametrize("at", [0, -1], ids=["in a factor", "in a replica"])
def test_shards_refuse_the_same_with_the_same_reasons(case: str, at: int) -> None:
    """Nothing of it is kept, and what was pending before stays."""
    local, sharded = make_both(MergeConfig(shards=3), [2, 2, 2], "none", Scripted)
    local.policy.next_decision = sharded.coordinator.policy.next_decision = "wait"  # type: ignore[attr-defined]
    contribution, value = BAD[case]
    for sent, number in ((make_contribution(0), 1), (contribution, 2)):
        codec = sharded.codecs[0]
        flat = random_flat(codec.plan.contribution.size, number).float()
        if value is not None and number == 2:
            flat[at] = value
        buffers, decoded = codec.encode(flat, None)
        if sent.head < HEADS:
            event_result = sharded.receive(sent, buffers)
            assert_same(local.receive(sent, decoded), event_result)
        else:
            refusal = local.refuse_by_numbers(sent)
            assert refusal is not None
            assert refusal == sharded.coordinator.refuse_by_numbers(sent)
    assert [shard.undecided for shard in sharded.shards] == [1, 1, 1]
    assert sharded.coordinator.pending_heads == local.pending_heads == [0]


def test_a_buffer_of_another_size_is_not_kept() -> None:
    """Its shard gives the reason that decoding all groups would, and keeps no other buffer of it, either."""
    _, sharded = make_both(MergeConfig(shards=2, send_down="dense"), [2, 2, 2], "none", Scripted)
    codec = sharded.codecs[0]
    buffers = list(codec.encode(random_flat(codec.plan.contribution.size, 1).float(), None)[0])
    buffers[1] = buffers[1][:-1]
    with pytest.raises(ValueError, match="expected a contribution's buffer of") as whole:
        codec.decode(dict(enumerate(buffers)), None)
    (shard,) = [shard for shard in sharded.shards if 1 in shard.groups]
    with pytest.raises(ValueError, match="expected") as part:
        shard.receive(1, 0, dict(enumerate(buffers)))
    assert str(part.value) == str(whole.value)
    assert shard.undecided == 0
