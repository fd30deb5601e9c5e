"""A contribution on the wire: one buffer of bytes per group of entries, in fp32, bf16 or int8.

In bf16 and int8, factors are sent as Q(factors - reference). The reference is the decoded factors of the head's last accepted
contribution, which the receiver has, so the rounding error is relative to the change. Replica changes are sent as Q(change),
optionally only the largest elements, and changes of running statistics exactly. The head treats the *decoded* contribution as
the contributed one, so its next contribution includes the rest (error feedback).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer.base_changes import ChangePacking
from lte_ray.transfer.groups import EntryGroup, subplan
from lte_ray.transfer.packing import (
    VALUE_BYTES,
    Packing,
    count_rounded_replicas,
    index_bytes,
    replica_elements_sent,
    scatter,
)


class Codec:
    """Packs and unpacks the contributions of heads with one plan.

    Args:
        plan: the head's plan; ranks may differ between heads.
        groups: the result of `make_groups`, the same for all heads.
        merge: gives `transfer` and `replica_topk`.
        dtype: type of contributions and references. fp32 transfer leaves float64 as it is.

    Attributes:
        group_plans: each group's plan: its `contribution` layout is that of `decode_group`'s result, its `base` layout that of
            the group's part of the base.
        buffer_sizes: bytes of each group's buffer.
        change_packings: pack the rounded changes of the groups' parts of the base, by group; of those that travel so.

    Raises:
        ValueError: the groups don't contain each entry of the base once, or the replicas are in several groups.
    """

    def __init__(
        self, plan: Plan, groups: Sequence[EntryGroup], merge: MergeConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        self.plan, self.groups, self.dtype = plan, tuple(groups), dtype
        names = [name for group in self.groups for name in group.names]
        if sorted(names) != sorted(entry.name for entry in plan.base.entries):
            raise ValueError(f"the groups must contain each entry of the base once; they contain {len(names)}: {names}")
        self.group_plans = tuple(subplan(plan, group.names) for group in self.groups)
        if sum(bool(each.replicas) for each in self.group_plans) > 1:
            raise ValueError("all replicas must be in one group, since their largest changes are selected among all of them")
        replicas = count_rounded_replicas(plan)
        self._by_change = merge.transfer != "fp32"
        self._exact = not self._by_change and replica_elements_sent(replicas, merge) == replicas
        self._packings = tuple(Packing(each, merge, dtype) for each in self.group_plans)
        self._slices = tuple(_slices(plan, each) for each in self.group_plans)
        self.change_packings = {
            index: ChangePacking(self.group_plans[index], merge.send_down, dtype)
            for index, group in enumerate(self.groups)
            if group.by_changes
        }

    @property
    def buffer_sizes(self) -> tuple[int, ...]:
        return tuple(packing.size for packing in self._packings)

    @property
    def change_sizes(self) -> dict[int, int]:
        """Bytes of the rounded changes of the groups' parts of the base, by group; of those that travel so."""
        return {index: packing.size for index, packing in self.change_packings.items()}

    def encode(self, contribution: Tensor, reference: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Packs a contribution.

        Args:
            contribution: flat, in the plan's contribution layout.
            reference: flat factors; None if there are none yet, or B' = 0.

        Returns:
            A buffer (uint8, flat, on the contribution's device) for each group, and the contribution as receivers decode it,
            bit for bit (on one kind of device). In fp32, without top-k, both may share the contribution's memory.

        Raises:
            ValueError: a tensor's size or type isn't the plan's.
        """
        self._check("contribution", contribution, self.plan.contribution.size)
        self._check("reference", reference, self.plan.factors_size)
        contribution = contribution.contiguous()
        if self._exact:
            return tuple(_select(contribution, slices).view(torch.uint8) for slices in self._slices), contribution
        buffers = tuple(
            packing.encode([contribution[at] for at in slices], self._references(reference, slices), contribution.device)
            for packing, slices in zip(self._packings, self._slices, strict=True)
        )
        return buffers, self.decode(dict(enumerate(buffers)), reference)

    def decode(self, buffers: Mapping[int, Tensor], reference: Tensor | None) -> Tensor:
        """Decodes the contribution, flat, from the buffers of all groups by number. In fp32 it may share a buffer's memory.

        Raises:
            ValueError: a buffer is missing or malformed, or the reference has the wrong size or type.
        """
        self._check("reference", reference, self.plan.factors_size)
        if set(buffers) != set(range(len(self.groups))):
            raise ValueError(f"expected the buffers of groups 0 to {len(self.groups) - 1}, found {sorted(buffers)}")
        if self._exact and len(buffers) == 1:
            return self.decode_group(0, buffers[0], None)
        out = torch.empty(self.plan.contribution.size, dtype=self.dtype, device=buffers[0].device)
        for index, slices in enumerate(self._slices):
            if self._exact:  # these buffers are in the contribution's order: nothing is rounded or left out
                scatter(self._packings[index].check_buffer(buffers[index]).view(self.dtype), out, slices)
            else:
                self._packings[index].decode(buffers[index], self._references(reference, slices), [out[at] for at in slices])
        return out

    def decode_group(self, index: int, buffer: Tensor, reference: Tensor | None) -> Tensor:
        """Decodes one group's part of the contribution, flat, in the layout `group_plans[index].contribution`.

        Args:
            index: the group's number.
            buffer: the group's buffer.
            reference: the group's part of the reference, flat (`slice_factors`); not used in fp32.

        Raises:
            ValueError: the buffer is malformed, or the reference has the wrong size or type.
        """
        packing, plan = self._packings[index], self.group_plans[index]
        self._check("reference", reference, plan.factors_size)
        if self._exact:
            return packing.check_buffer(buffer).view(self.dtype)
        out = torch.empty(plan.contribution.size, dtype=self.dtype, device=buffer.device)
        slices = _slices(plan, plan)
        packing.decode(buffer, self._references(reference, slices), [out[at] for at in slices])
        return out

    def slice_contribution(self, index: int, contribution: Tensor) -> Tensor:
        """Returns the group's part of a flat contribution (layout `group_plans[index].contribution`); a view if possible."""
        return _select(contribution, self._slices[index])

    def slice_factors(self, index: int, factors: Tensor) -> Tensor:
        """Returns the group's part of flat factors (a reference), the leading part of a contribution; a view if possible."""
        return _select(factors, self._slices[index][: len(self.group_plans[index].adapted)])

    def _references(self, reference: Tensor | None, slices: Sequence[slice]) -> list[Tensor | None]:
        """Returns each segment's reference; None for replica changes, which follow the factors, and for all in fp32."""
        if reference is None or not self._by_change:
            return [None] * len(slices)
        return [reference[at] if at.stop <= len(reference) else None for at in slices]

    def _check(self, what: str, tensor: Tensor | None, size: int) -> None:
        if tensor is not None and (tensor.shape != (size,) or tensor.dtype != self.dtype):
            found = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"expected a flat {what} of {size} elements of {self.dtype}, found {found}")


def min_contribution_bytes(plan: Plan, merge: MergeConfig) -> int:
    """Returns the fewest bytes of a contribution in its format: all values sent, and which replica elements are; no scales."""
    replicas = count_rounded_replicas(plan)
    count, statistics = replica_elements_sent(replicas, merge), plan.contribution.size - plan.factors_size - replicas
    rounded = VALUE_BYTES[merge.transfer] * (plan.factors_size + count)
    return rounded + VALUE_BYTES["fp32"] * statistics + index_bytes(replicas, count)


def _slices(plan: Plan, part: Plan) -> tuple[slice, ...]:
    """Returns where the part's segments are in the plan's contribution: each adapted weight's factors, then the replicas."""
    starts = {e.name: e.offset for e in plan.contribution.entries}
    slices = [slice(starts[a.a_name], starts[a.a_name] + a.rank * sum(a.matrix)) for a in part.adapted]
    size = part.contribution.size - part.factors_size
    return (*slices, *[slice(plan.factors_size, plan.factors_size + size)] * bool(size))


def _select(flat: Tensor, slices: Sequence[slice]) -> Tensor:
    """Returns these slices of a flat tensor, concatenated: a view if they are adjacent."""
    if all(a.stop == b.start for a, b in pairwise(slices)):
        return flat[slices[0].start : slices[-1].stop] if slices else flat[:0]
    return torch.cat([flat[at] for at in slices])
