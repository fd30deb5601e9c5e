"""Named tensors in one flat buffer, so that an entire model travels between processes as one contiguous array."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Layout, Plan


def views(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """Returns the named tensors of `flat` (1-D, `layout.size` elements); they share its memory.

    Raises:
        ValueError: `flat` has a different shape.
    """
    if flat.shape != (layout.size,):
        raise ValueError(f"expected a flat buffer of {layout.size} elements, found shape {tuple(flat.shape)}")
    return {e.name: flat[e.offset : e.offset + e.size].view(e.shape) for e in layout.entries}


def as_matrix(spec: Adapted, weight: Tensor) -> Tensor:
    """Views a stored, contiguous main weight as the matrix W (out x in)."""
    return weight.t() if spec.transposed else weight.view(spec.matrix)


def as_stored(spec: Adapted, matrix: Tensor) -> Tensor:
    """Views a matrix W (out x in) in the shape in which the weight is stored."""
    return matrix.t() if spec.transposed else matrix.reshape(spec.shape)


def gather(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Copies the named tensors, from any device, into a new flat buffer."""
    flat = torch.empty(layout.size, dtype=dtype, device=device)
    for name, view in views(layout, flat).items():
        view.copy_(tensors[name].detach())
    return flat


def copy_rounded(tensor: Tensor, value: Tensor) -> None:
    """Copies a merged value into a model's tensor; counters and flags take the nearest integer."""
    tensor.copy_(value.round() if value.is_floating_point() and not tensor.is_floating_point() else value)


def factor_views(plan: Plan, factors: Tensor) -> dict[str, Tensor]:
    """Returns the named factors of the leading part of a contribution (`factors_part`)."""
    entries = plan.contribution.entries[: 2 * len(plan.adapted)]
    return {e.name: factors[e.offset : e.offset + e.size].view(e.shape) for e in entries}


def replica_views(plan: Plan, replicas: Tensor) -> dict[str, Tensor]:
    """Returns the named replicas of the trailing part of a base (`base_replicas`) or contribution (`replica_part`)."""
    sizes = [math.prod(r.shape) for r in plan.replicas]
    return {r.name: part.view(r.shape) for r, part in zip(plan.replicas, torch.split(replicas, sizes), strict=True)}


def factors_part(plan: Plan, contribution: Tensor) -> Tensor:
    """Returns the factors in a flat contribution: its leading part."""
    return contribution[: plan.factors_size]


def replica_part(plan: Plan, contribution: Tensor) -> Tensor:
    """Returns the replica changes in a flat contribution, which follow the factors."""
    return contribution[plan.factors_size :]


def base_replicas(plan: Plan, base: Tensor) -> Tensor:
    """Returns the replica parameters in a flat base, which follow the main weights."""
    return base[base.numel() - (plan.contribution.size - plan.factors_size) :]
