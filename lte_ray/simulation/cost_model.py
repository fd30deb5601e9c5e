"""Bytes on the network and the coordinator's computation, from the plans' shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lte_ray.config import MergeConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging.registry import make_policy, may_merge_by_weights
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups

VALUE_BYTES = 4
"""Bytes of a value of the base."""


def as_sent(merge: MergeConfig) -> MergeConfig:
    """Returns the settings with the way down that a run on several machines has, where they leave it open for each layer.

    Heads can't redo merges of policies that compute with all contributions, so they are sent the base.
    """
    if merge.send_down == "auto" and not may_merge_by_weights(make_policy(merge)):
        return replace(merge, send_down="dense")
    return merge


class CostModel:
    """Bytes and costs of a run. For heads with different ranks, what goes down and what is merged count by the mean rank.

    Args:
        plans: each head's.
        merge: transfer formats, what is sent down, shards.

    Attributes:
        base_bytes: of the complete dense base.
        dense_bytes: of the part of a new base that every head is sent; 0 where factors or changes describe all of it.
        change_bytes: of the rounded change from one version to the next; 0 where it isn't sent so.
    """

    def __init__(self, plans: Sequence[Plan], merge: MergeConfig) -> None:
        plan, count = plans[0], len(plans)
        groups = make_groups(plans, merge)
        codecs = {each: Codec(each, groups, merge) for each in set(plans)}
        sizes = {each: codec.buffer_sizes for each, codec in codecs.items()}
        self._contribution_bytes = [sum(sizes[each]) for each in plans]
        self.base_bytes = VALUE_BYTES * plan.base.size
        mean = [sum(each.adapted[i].rank for each in plans) / count for i in range(len(plan.adapted))]
        ranks = {a.name: rank for a, rank in zip(plan.adapted, mean, strict=True)}
        matrices = {a.name: a.matrix for a in plan.adapted}
        entries = {entry.name: entry.size for entry in plan.base.entries}
        self._factor_bytes = sum(
            sum(sizes[each][i] for each in plans) / count for i, group in enumerate(groups) if group.by_factors
        )
        self.dense_bytes = VALUE_BYTES * sum(entries[name] for group in groups if not group.redone for name in group.names)
        self.change_bytes = sum(codecs[plan].change_sizes.values())
        self._operations = [0.0] * merge.shards  # of one contribution's products, by shard
        self._values = [0.0] * merge.shards  # of one contribution
        self._weights = [0.0] * merge.shards  # of the base
        for group in groups:
            for name in group.names:
                rank = ranks.get(name)
                values = entries[name] if rank is None else rank * sum(matrices[name])
                self._operations[group.shard] += 0.0 if rank is None else 2 * entries[name] * 2 * rank
                self._values[group.shard] += values
                self._weights[group.shard] += entries[name]

    def contribution_bytes(self, head: int) -> int:
        """Bytes of this head's contribution."""
        return self._contribution_bytes[head]

    def update_bytes(self, others: int, versions: int = 1) -> tuple[int, int]:
        """(dense, factors): bytes that bring a head up to date.

        Args:
            others: contributions of other heads that it lacks.
            versions: that it lacks. It is sent their changes, or the base if that is fewer bytes.
        """
        return self.dense_bytes + min(versions * self.change_bytes, self.base_bytes), math.ceil(others * self._factor_bytes)

    def merge_seconds(self, cluster: ClusterModel, contributions: int) -> float:
        """The coordinator's time for one merge: products, and passes through memory; that of its busiest shard.

        A contribution is read three times (its check, the products and sums, its reference) and written once; the base is read
        and written once, and copied once to be published.
        """
        return max(
            _seconds(contributions * operations, cluster.merge_flops)
            + _seconds(4 * VALUE_BYTES * (contributions * values + weights), cluster.merge_memory)
            for operations, values, weights in zip(self._operations, self._values, self._weights, strict=True)
        )


def _seconds(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0


GPT2 = {"gpt2-124m": (768, 12), "gpt2-355m": (1024, 24), "gpt2-774m": (1280, 36), "gpt2-1558m": (1600, 48)}
"""Shapes known by name: width and depth."""


def named_plan(name: str, rank: int, alpha: float) -> Plan:
    """The plan of a GPT-2: four matrices a block adapted; embeddings (tied), norms and biases are replicas."""
    width, depth = GPT2[name]
    matrices = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    adapted: list[Adapted] = []
    replicas = [Replica("wte.weight", (50257, width)), Replica("wpe.weight", (1024, width))]
    for block in range(depth):
        for part, shape in matrices.items():
            adapted.append(Adapted(f"h.{block}.{part}.weight", shape, min(rank, *shape), alpha / rank))
            replicas.append(Replica(f"h.{block}.{part}.bias", shape[:1]))
        replicas += [Replica(f"h.{block}.norm{n}.{p}", (width,)) for n in (1, 2) for p in ("weight", "bias")]
    replicas += [Replica(f"norm.{p}", (width,)) for p in ("weight", "bias")]
    return Plan(tuple(adapted), tuple(replicas))
