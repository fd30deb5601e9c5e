"""Element-by-element merges, for policies that weights can't express; they work on one entry of the base at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import views
from lte_ray.merging.policy import Pending, Roster

CHUNK = 1 << 18
"""Elements per call of a reduction, so that its intermediate results stay small."""


def reduce_elementwise(
    pending: Sequence[Pending],
    roster: Roster,
    reduce: Callable[[Tensor], Tensor],
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Reduces the contributions' k values of each element to one change, flat in `roster.layout`.

    At a time, holds k dense copies of one entry, the result, and what `reduce` allocates for one chunk.

    Args:
        reduce: (k, n) -> (n), for any n: treats each column independently.
        prepare: applied first to each contribution's entire entry, flat; may change it in place.
    """
    change = pending[0].share.contribution.new_zeros(roster.layout.size)
    for entry in roster.layout.entries:
        stack = change.new_empty(len(pending), entry.size)
        for row, p in zip(stack, pending, strict=True):
            row.copy_(p.part(entry.name).reshape(-1))
            if prepare is not None:
                row.copy_(prepare(row))
        out = change[entry.offset : entry.offset + entry.size]
        for begin in range(0, entry.size, CHUNK):
            out[begin : begin + CHUNK] = reduce(stack[:, begin : begin + CHUNK])
    return change


def sum_entries(pending: Sequence[Pending], roster: Roster, term: Callable[[Pending, str, Tensor], Tensor]) -> Tensor:
    """Returns the sum over contributions of `term(pending, name, dense change)`, flat; works on one dense entry at a time."""
    change = pending[0].share.contribution.new_zeros(roster.layout.size)
    for name, out in views(roster.layout, change).items():
        for p in pending:
            out.add_(term(p, name, p.part(name)))
    return change


def merged_fraction(pending: Sequence[Pending], roster: Roster) -> float:
    """Returns k / N, the weight of a value that replaces k of N contributions, so that equal ones merge as with the average."""
    return len(pending) / roster.num_heads


def keep_largest(values: Tensor, fraction: float) -> Tensor:
    """Sets all but the given fraction of largest magnitudes in `values` (flat) to 0; keeps all values of equal magnitude."""
    keep = max(1, round(fraction * values.numel()))
    if keep >= values.numel():
        return values
    threshold = torch.kthvalue(values.abs(), values.numel() - keep + 1).values
    return torch.where(values.abs() >= threshold, values, 0)
