"""Groups of a base's entries that travel and merge together: by shard, and by how heads receive their merges."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lte_ray.config.merge import ROUNDED_CHANGES, MergeConfig
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted, Plan

BLOCK = 512
"""Consecutive values that share one scale in int8."""

MAX_REPLICA_OVERHEAD = 0.02
"""Fraction of the bytes sent to heads that replicas may add so that heads need only contributions."""

BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / BLOCK}
"""Bytes per value in each transfer format, including int8's fp32 scales."""


@dataclass(frozen=True)
class EntryGroup:
    """Entries of the base that are contributed in one buffer.

    Attributes:
        names: names of adapted weights and replicas, in the plan's order.
        shard: the number of the shard that merges them.
        by_factors: whether heads receive merges as the merged factors; else as the new dense base, or its change.
        by_changes: whether heads receive merges as the rounded change of the base.
    """

    names: tuple[str, ...]
    shard: int
    by_factors: bool
    by_changes: bool = False

    @property
    def redone(self) -> bool:
        """Whether heads make a new version from the one that they have."""
        return self.by_factors or self.by_changes


def make_groups(plans: Sequence[Plan], merge: MergeConfig) -> tuple[EntryGroup, ...]:
    """Distributes the entries of the base over `merge.shards`, in at most one group by factors and one dense group per shard.

    A weight is sent to heads by factors if a head, in a merge of all N heads, then receives fewer bytes than out x in x 4: the
    factors of the N - 1 others, sum of r_n (out + in) in the transfer format (if ranks differ, the mean over the heads). Where
    heads never merge, these are none. `merge.send_down` may force either form; if it names a format, all is dense, and sent as
    rounded changes. Replicas are all in shard 0. They are sent as the N - 1 others' changes if that is fewer bytes, or if all
    weights are sent by factors and it adds at most 2% to these (then no head waits for the coordinator's own base); else dense.

    Balances the shards' work greedily, the largest first: out x in x (sum of r_n) of a weight, and size x N of the replicas.
    Two shards differ by at most one weight's work, unless the replicas alone are more.

    Args:
        plans: each head's plan.

    Raises:
        ConfigError: there are more shards than adapted weights.
    """
    plan = plans[0]
    if merge.shards > max(1, len(plan.adapted)):
        raise ConfigError(
            f"--shards is {merge.shards}, but the model has {len(plan.adapted)} adapted weights to distribute over them: "
            + (f"choose at most {len(plan.adapted)}." if plan.adapted else "leave --shards out.")
        )
    ranks = [sum(each.adapted[i].rank for each in plans) for i in range(len(plan.adapted))]
    shard_of = _balance_shards(plan, ranks, len(plans), merge.shards)
    by_factors = [_fewer_by_factors(spec, r, len(plans), merge) for spec, r in zip(plan.adapted, ranks, strict=True)]
    groups: list[EntryGroup] = []
    by_changes = merge.send_down in ROUNDED_CHANGES
    for shard in range(merge.shards):
        members = [i for i, s in enumerate(shard_of) if s == shard]
        factors = [plan.adapted[i].name for i in members if by_factors[i]]
        dense = [plan.adapted[i].name for i in members if not by_factors[i]]
        if shard == 0:
            as_changes = _replicas_by_contributions(plan, ranks, all(by_factors), len(plans), merge)
            (factors if as_changes else dense).extend(r.name for r in plan.replicas)
        ways = (EntryGroup(tuple(factors), shard, True), EntryGroup(tuple(dense), shard, False, by_changes))
        groups += [group for group in ways if group.names]
    return tuple(groups)


def subplan(plan: Plan, names: Collection[str]) -> Plan:
    """Returns the plan of only these entries, in the plan's order; its layouts are those of a group's flat tensors.

    Raises:
        ValueError: the plan has no such entry.
    """
    selected = set(names)
    part = Plan(tuple(a for a in plan.adapted if a.name in selected), tuple(r for r in plan.replicas if r.name in selected))
    unknown = selected - {e.name for e in part.base.entries}
    if unknown:
        raise ValueError(f"the plan has no entries {sorted(unknown)}")
    return part


def _fewer_by_factors(spec: Adapted, ranks: int, heads: int, merge: MergeConfig) -> bool:
    """Whether a weight goes down by factors; `ranks` is the sum over all heads."""
    if merge.never_merge:
        return True
    if merge.send_down != "auto":
        return merge.send_down == "factors"
    out, inner = spec.matrix
    return (heads - 1) * ranks * (out + inner) * BYTES_PER_VALUE[merge.transfer] < heads * out * inner * 4  # exact in floats


def _replicas_by_contributions(plan: Plan, ranks: Sequence[int], all_by_factors: bool, heads: int, merge: MergeConfig) -> bool:
    """Returns whether replicas are sent as the others' changes; `all_by_factors`: whether all weights are sent by factors."""
    if merge.send_down != "auto":
        return merge.send_down == "factors"
    width = BYTES_PER_VALUE[merge.transfer]
    size = plan.contribution.size - plan.factors_size
    more = size * ((heads - 1) * width - 4)
    factors = sum((heads - 1) / heads * r * sum(spec.matrix) * width for spec, r in zip(plan.adapted, ranks, strict=True))
    return more <= 0 or (all_by_factors and more <= MAX_REPLICA_OVERHEAD * factors)


def _balance_shards(plan: Plan, ranks: Sequence[int], heads: int, shards: int) -> list[int]:
    """Returns the shard of each adapted weight: assigns the costliest first, each to the shard with the least work so far."""
    costs = [spec.matrix[0] * spec.matrix[1] * r for spec, r in zip(plan.adapted, ranks, strict=True)]
    load = [0] * shards
    load[0] = (plan.contribution.size - plan.factors_size) * heads
    shard_of = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        shard_of[i] = min(range(shards), key=lambda s: (load[s], s))
        load[shard_of[i]] += costs[i]
    return shard_of
