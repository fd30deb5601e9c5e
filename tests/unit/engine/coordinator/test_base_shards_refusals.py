"""What a coordinator of numbers refuses, in the words of one that has the tensors; and policies that need them."""

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
from tests.support.base_shards import HEADS, Whims, both, same
from tests.support.helpers import offer, random_flat


@pytest.mark.parametrize("name", sorted(set(POLICIES) - set(WEIGHT_POLICIES)))
def test_built_in_policies_that_need_tensors_are_refused_before_a_run(name: str) -> None:
    """The error names the policy and what to change; one shard is no shard."""
    make_policy(MergeConfig(policy=name))
    with pytest.raises(ConfigError, match=rf"--policy {name} .*needs --shards 1, but --shards is 2\.") as caught:
        make_policy(MergeConfig(policy=name, shards=2))
    assert "average, samples, stale" in str(caught.value)


class Curious:
    """Does with tensors what it is told."""

    def __init__(self, what: Callable[[Sequence[Pending], Roster], Any]) -> None:
        self.what = what

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return self.what(pending, roster) if pending else Wait()


@pytest.mark.parametrize(
    ("what", "said"),
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
def test_a_policy_that_needs_tensors_is_told_to_use_one_shard(what: Callable, said: str) -> None:
    """One clear error that names the policy, whatever it touches; nothing was merged."""
    _, spread = both(MergeConfig(shards=2), [2, 2], "none", lambda: Curious(what))
    buffers, _ = spread.codecs[0].encode(random_flat(spread.codecs[0].plan.contribution.size, 1).float(), None)
    with pytest.raises(PolicyError, match=rf"The merge policy Curious {said}.*needs --shards 1, but --shards is 2"):
        spread.receive(offer(0), buffers)
    assert spread.coordinator.version == 0


BAD: dict[str, tuple[Contribution, float | None]] = {
    "another run": (offer(1, run="other"), None),
    "unknown head": (offer(7), None),
    "repeat": (offer(0), None),
    "stale incarnation": (offer(0, 9, incarnation=-1), None),
    "undecided": (offer(0, 2), None),
    "too new": (offer(1, version=1), None),
    "NaN": (offer(1), float("nan")),
    "infinite": (offer(1), float("-inf")),
    "absurdly large": (offer(1), 1e16),
}


@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.parametrize("at", [0, -1], ids=["in a factor", "in a replica"])
def test_what_is_refused_in_one_place_is_refused_in_shards_in_the_same_words(case: str, at: int) -> None:
    """And nothing of it is kept, while what was pending before stays."""
    one, spread = both(MergeConfig(shards=3), [2, 2, 2], "none", Whims)
    one.policy.what = spread.coordinator.policy.what = "wait"  # type: ignore[attr-defined]
    contribution, value = BAD[case]
    for sent, number in ((offer(0), 1), (contribution, 2)):
        codec = spread.codecs[0]
        flat = random_flat(codec.plan.contribution.size, number).float()
        if value is not None and number == 2:
            flat[at] = value
        buffers, decoded = codec.encode(flat, None)
        if sent.head < HEADS:
            outcome = spread.receive(sent, buffers)
            same(one.receive(sent, decoded), outcome)
        else:
            refusal = one.check_numbers(sent)
            assert refusal is not None
            assert refusal == spread.coordinator.check_numbers(sent)
    assert [shard.undecided for shard in spread.shards] == [1, 1, 1]
    assert spread.coordinator.pending_heads == one.pending_heads == [0]


def test_a_buffer_of_another_size_is_not_kept() -> None:
    """The shard that it belongs to says so in the words of decoding all at once; it keeps no other buffer of it, either."""
    _, spread = both(MergeConfig(shards=2, send_down="dense"), [2, 2, 2], "none", Whims)
    codec = spread.codecs[0]
    buffers = list(codec.encode(random_flat(codec.plan.contribution.size, 1).float(), None)[0])
    buffers[1] = buffers[1][:-1]
    with pytest.raises(ValueError, match="expected a contribution's buffer of") as whole:
        codec.decode(dict(enumerate(buffers)), None)
    (shard,) = [shard for shard in spread.shards if 1 in shard.groups]
    with pytest.raises(ValueError, match="expected") as part:
        shard.receive(1, 0, dict(enumerate(buffers)))
    assert str(part.value) == str(whole.value)
    assert shard.undecided == 0
