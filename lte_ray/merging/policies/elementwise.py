"""For policies that weights can't express: the change computed element by element, one entry of the base at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import views
from lte_ray.merging.policy import Pending, Roster

PIECE = 1 << 18
"""Elements that a reduction gets at a time, so that what it makes on the way stays small."""


def by_elements(
    pending: Sequence[Pending],
    roster: Roster,
    reduce: Callable[[Tensor], Tensor],
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The change that `reduce` makes of the contributions' k values of each element, flat in `roster.layout`.

    The dense copies that exist at once are the k of one entry, the one being made, and those of a piece that `reduce` makes.

    Args:
        reduce: (k, n) -> (n), for any n: it must look at each column by itself.
        prepare: applied to each contribution's whole entry, flat, before; it may change it in place.
    """
    change = pending[0].share.contribution.new_zeros(roster.layout.size)
    for entry in roster.layout.entries:
        stack = change.new_empty(len(pending), entry.size)
        for row, p in zip(stack, pending, strict=True):
            row.copy_(p.part(entry.name).reshape(-1))
            if prepare is not None:
                row.copy_(prepare(row))
        out = change[entry.offset : entry.offset + entry.size]
        for begin in range(0, entry.size, PIECE):
            out[begin : begin + PIECE] = reduce(stack[:, begin : begin + PIECE])
    return change


def sum_of_entries(pending: Sequence[Pending], roster: Roster, term: Callable[[Pending, str, Tensor], Tensor]) -> Tensor:
    """The sum over contributions of `term(pending, name, dense change)` of each entry, flat; one dense part at a time."""
    change = pending[0].share.contribution.new_zeros(roster.layout.size)
    for name, out in views(roster.layout, change).items():
        for p in pending:
            out.add_(term(p, name, p.part(name)))
    return change


def share_of_all(pending: Sequence[Pending], roster: Roster) -> float:
    """k / N: what one value that stands for k of N contributions counts, so that equal contributions merge as by average."""
    return len(pending) / roster.num_heads


def largest(values: Tensor, share: float) -> Tensor:
    """`values` (flat) with all but the given share of largest magnitude set to 0. Of equal magnitudes all are kept."""
    keep = max(1, round(share * values.numel()))
    if keep >= values.numel():
        return values
    threshold = torch.kthvalue(values.abs(), values.numel() - keep + 1).values
    return torch.where(values.abs() >= threshold, values, 0)
