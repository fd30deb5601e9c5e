"""Which parts of a base travel and merge together: groups of entries, by shard and by how heads get their merges."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lte_ray.config.merge import MergeConfig
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted, Plan

BLOCK = 512
"""Consecutive values that share one scale in int8."""

SURCHARGE = 0.02
"""Share of the bytes down that replicas may add so that heads need nothing but contributions."""

WIDTHS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / BLOCK}
"""Bytes a value in each transfer format, with int8's fp32 scales."""


@dataclass(frozen=True)
class Group:
    """Entries of the base that are contributed in one buffer.

    Attributes:
        names: of adapted weights and replicas, in the plan's order.
        shard: the number of the shard that merges them.
        by_factors: whether heads get their merges as the merged factors; else as the new dense base.
    """

    names: tuple[str, ...]
    shard: int
    by_factors: bool


def groups(plans: Sequence[Plan], merge: MergeConfig) -> tuple[Group, ...]:
    """Spreads the entries of the base over `merge.shards`, in at most one group by factors and one dense group each.

    A weight goes down by factors where a head, in a merge of all N heads, then gets fewer bytes than out x in x 4: the
    factors of the N - 1 others, sum of r_n (out + in) in the transfer format (where ranks differ, the mean over the
    heads). `merge.send_down` may force either. Replicas are together in shard 0, and go down as weights do: as the N - 1
    others' changes if all weights go so and that adds at most 2% to their factors (then no head waits for the coordinator's
    own base), or is fewer bytes; else dense.

    The shards' work, out x in x (sum of r_n) of a weight and size x N of the replicas, is balanced greedily, the largest
    first: two shards differ by at most one weight's, unless the replicas alone are more.

    Args:
        plans: each head's.

    Raises:
        ConfigError: there are more shards than adapted weights.
    """
    plan = plans[0]
    if merge.shards > len(plan.adapted):
        raise ConfigError(
            f"--shards is {merge.shards}, but the model has {len(plan.adapted)} adapted weights to spread over them: "
            f"choose at most {len(plan.adapted)}."
        )
    ranks = [sum(each.adapted[i].rank for each in plans) for i in range(len(plan.adapted))]
    shard_of = _balanced(plan, ranks, len(plans), merge.shards)
    by_factors = [_fewer_by_factors(spec, r, len(plans), merge) for spec, r in zip(plan.adapted, ranks, strict=True)]
    found = []
    for shard in range(merge.shards):
        mine = [i for i, s in enumerate(shard_of) if s == shard]
        factors = [plan.adapted[i].name for i in mine if by_factors[i]]
        dense = [plan.adapted[i].name for i in mine if not by_factors[i]]
        if shard == 0:
            (factors if _replicas_by_changes(plan, ranks, all(by_factors), len(plans), merge) else dense).extend(
                r.name for r in plan.replicas
            )
        found += [Group(tuple(names), shard, way) for names, way in ((factors, True), (dense, False)) if names]
    return tuple(found)


def part(plan: Plan, names: Collection[str]) -> Plan:
    """The plan of these entries of the base alone, in the plan's order: its layouts are those of a group's flat tensors.

    Raises:
        ValueError: the plan has no such entry.
    """
    wanted = set(names)
    found = Plan(tuple(a for a in plan.adapted if a.name in wanted), tuple(r for r in plan.replicas if r.name in wanted))
    unknown = wanted - {e.name for e in found.base.entries}
    if unknown:
        raise ValueError(f"the plan has no entries {sorted(unknown)}")
    return found


def _fewer_by_factors(spec: Adapted, ranks: int, heads: int, merge: MergeConfig) -> bool:
    """Whether a weight goes down by factors; `ranks` is the sum over all heads."""
    if merge.send_down != "auto":
        return merge.send_down == "factors"
    out, inner = spec.matrix
    return (heads - 1) * ranks * (out + inner) * WIDTHS[merge.transfer] < heads * out * inner * 4  # exact in floats


def _replicas_by_changes(plan: Plan, ranks: Sequence[int], alone: bool, heads: int, merge: MergeConfig) -> bool:
    """Whether replicas go down as the others' changes; `alone`: they are all that would make heads wait for a base."""
    if merge.send_down != "auto":
        return merge.send_down == "factors"
    width = WIDTHS[merge.transfer]
    size = plan.contribution.size - plan.factors_size
    more = size * ((heads - 1) * width - 4)
    factors = sum((heads - 1) / heads * r * sum(spec.matrix) * width for spec, r in zip(plan.adapted, ranks, strict=True))
    return more <= 0 or (alone and more <= SURCHARGE * factors)


def _balanced(plan: Plan, ranks: Sequence[int], heads: int, shards: int) -> list[int]:
    """The shard of each adapted weight: the costliest first, each to the shard with the least so far."""
    costs = [spec.matrix[0] * spec.matrix[1] * r for spec, r in zip(plan.adapted, ranks, strict=True)]
    load = [0] * shards
    load[0] = (plan.contribution.size - plan.factors_size) * heads
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen[i] = min(range(shards), key=lambda s: (load[s], s))
        load[chosen[i]] += costs[i]
    return chosen
