"""Plans, flat buffers and contribution records without a model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.messages import Contribution


def plan_from_shapes(
    shapes: list[tuple[int, int, int]],
    replicas: list[tuple[int, ...]],
    scaling: float = 1.0,
    statistics: Collection[int] = (),
) -> Plan:
    """Returns a plan of weights (out, in, rank) and replica shapes; replicas with these numbers are running statistics."""
    adapted = tuple(Adapted(f"w{i}", (out, inn), rank, scaling) for i, (out, inn, rank) in enumerate(shapes))
    return Plan(adapted, tuple(Replica(f"p{i}", shape, buffer=i in statistics) for i, shape in enumerate(replicas)))


def random_flat(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_contribution(head: int, sequence: int = 1, **changes: object) -> Contribution:
    """Returns a contribution without its buffer."""
    values = {"run": "test", "incarnation": 0, "version": 0, "step": 3 * sequence, "steps": 3, "samples": 12, "loss": 1.0}
    return Contribution(head=head, sequence=sequence, **(values | changes))  # type: ignore[arg-type]
