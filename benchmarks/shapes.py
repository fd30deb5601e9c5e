"""GPT-2-124M's shapes and random contributions, for benchmarks of merging without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Plan
from lte_ray.simulation import named_plan

RANK, ALPHA = 32, 64.0
DISTINCT = 16
"""Different contributions. With more heads, several have the same one."""


def gpt2_plan(embeddings: bool) -> Plan:
    """The plan of GPT-2 124M, with or without factors on its embeddings."""
    plan = named_plan("gpt2-124m", RANK, ALPHA)
    if not embeddings:
        return plan
    tables = [r for r in plan.replicas if r.name in ("wte.weight", "wpe.weight")]
    adapted = [Adapted(r.name, r.shape, RANK, ALPHA / RANK) for r in tables]
    return Plan((*adapted, *plan.adapted), tuple(r for r in plan.replicas if r not in tables))


@dataclass(frozen=True)
class Piece:
    """A part of the plan: its base before the merge, and the heads' contributions. Head n has number n modulo `DISTINCT`."""

    plan: Plan
    start: Tensor
    buffers: list[Tensor]
    references: list[Tensor]

    @classmethod
    def random(cls, plan: Plan, heads: int) -> Piece:
        generator = torch.Generator().manual_seed(0)

        def draw(size: int) -> Tensor:
            return torch.randn(size, generator=generator).mul_(0.02)

        count = range(min(heads, DISTINCT))
        references = [draw(plan.factors_size) for _ in count]
        return cls(plan, draw(plan.base.size), [draw(plan.contribution.size) for _ in count], references)

    def references_of(self, heads: int) -> dict[int, Tensor]:
        """Every head's reference."""
        return {head: self.references[head % DISTINCT] for head in range(heads)}

    def difference(self, base: Tensor, other: Tensor) -> float:
        """The distance between the weights of two new bases, relative to their distance from the old weights."""
        size = sum(entry.size for entry in self.plan.base.entries[: len(self.plan.adapted)])
        return float((base - other)[:size].norm() / (other - self.start)[:size].norm())
