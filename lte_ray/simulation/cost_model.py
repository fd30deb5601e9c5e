"""How many bytes travel and how much the coordinator computes, by the plan's shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lte_ray.config import MergeConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups

DENSE_BYTES = 4
"""Bytes of a value of the base."""


class CostModel:
    """Bytes and costs of a run. Of heads with different ranks, what goes down and is merged counts with their mean.

    Args:
        plans: each head's.
        merge: the formats, what goes down, shards.
    """

    def __init__(self, plans: Sequence[Plan], merge: MergeConfig) -> None:
        plan, count = plans[0], len(plans)
        parts = make_groups(plans, merge)
        sizes = {each: Codec(each, parts, merge).buffer_sizes for each in set(plans)}
        self._up = [sum(sizes[each]) for each in plans]
        self.base = DENSE_BYTES * plan.base.size
        """Bytes of the whole dense base."""
        mean = [sum(each.adapted[i].rank for each in plans) / count for i in range(len(plan.adapted))]
        ranks = {a.name: rank for a, rank in zip(plan.adapted, mean, strict=True)}
        matrices = {a.name: a.matrix for a in plan.adapted}
        entries = {entry.name: entry.size for entry in plan.base.entries}
        self._factors = sum(sum(sizes[each][i] for each in plans) / count for i, group in enumerate(parts) if group.by_factors)
        self.dense = DENSE_BYTES * sum(entries[name] for group in parts if not group.by_factors for name in group.names)
        """Bytes of the new base that a head is sent; 0 where factors say it all."""
        self._operations = [0.0] * merge.shards  # of one contribution's products, by shard
        self._values = [0.0] * merge.shards  # of one contribution
        self._weights = [0.0] * merge.shards  # of the base
        for group in parts:
            for name in group.names:
                rank = ranks.get(name)
                values = entries[name] if rank is None else rank * sum(matrices[name])
                self._operations[group.shard] += 0.0 if rank is None else 2 * entries[name] * 2 * rank
                self._values[group.shard] += values
                self._weights[group.shard] += entries[name]

    def up(self, head: int) -> int:
        """Bytes of this head's contribution."""
        return self._up[head]

    def down(self, others: int) -> tuple[int, int]:
        """(dense, factors): bytes that bring a head up to date which lacks `others` contributions of other heads."""
        return self.dense, math.ceil(others * self._factors)

    def merge_seconds(self, cluster: ClusterModel, contributions: int) -> float:
        """The coordinator's time for one merge: products, and passes over memory; of its shards, the busiest's.

        A contribution is read three times (its check, the products and sums, its reference) and written once; the base is read
        and written once, and copied once to be published.
        """
        return max(
            _over(contributions * operations, cluster.merge_flops)
            + _over(4 * DENSE_BYTES * (contributions * values + weights), cluster.merge_memory)
            for operations, values, weights in zip(self._operations, self._values, self._weights, strict=True)
        )


def _over(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0


GPT2 = {"gpt2-124m": (768, 12), "gpt2-355m": (1024, 24), "gpt2-774m": (1280, 36), "gpt2-1558m": (1600, 48)}
"""Shapes known by name: width and depth."""


def named_plan(name: str, rank: int, alpha: float) -> Plan:
    """What conversion makes of a GPT-2: four matrices a block adapted; embeddings (tied), norms and biases are replicas."""
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
