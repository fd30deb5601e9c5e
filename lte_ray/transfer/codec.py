"""What a contribution is on the wire: one buffer of bytes per group of entries, in fp32, bf16 or int8.

Factors travel in bf16 and int8 as Q(factors - reference), where the reference is the decoded factors of the head's last
accepted contribution, which the receiver holds; so the rounding error is relative to the change. Replica changes travel
as Q(change), of the largest elements alone if so set. The head takes the *decoded* contribution as what it
contributed, so what was left out rides in its next one (error feedback, DESIGN 3.4 and 3.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer.groups import Group, part
from lte_ray.transfer.packing import Packing, kept, where_bytes


class Codec:
    """Packs and unpacks the contributions of heads with one plan.

    Args:
        plan: the head's, whose ranks may be its own.
        groups: of `groups`; the same for all heads.
        merge: its `transfer` and `replica_topk`.
        dtype: of contributions and references. fp32 transfer keeps float64 as it is.

    Attributes:
        parts: each group's own plan: its `contribution` layout is that of `decode_group`'s result, its `base` layout a
            shard's.
        sizes: bytes of each group's buffer.

    Raises:
        ValueError: the groups don't hold each entry of the base once, or the replicas are in several groups.
    """

    def __init__(self, plan: Plan, groups: Sequence[Group], merge: MergeConfig, dtype: torch.dtype = torch.float32) -> None:
        self.plan, self.groups, self.dtype = plan, tuple(groups), dtype
        names = [name for group in self.groups for name in group.names]
        if sorted(names) != sorted(entry.name for entry in plan.base.entries):
            raise ValueError(f"the groups must hold each entry of the base once; they hold {len(names)}: {names}")
        self.parts = tuple(part(plan, group.names) for group in self.groups)
        if sum(bool(each.replicas) for each in self.parts) > 1:
            raise ValueError(
                "all replicas must be in one group: which of their changes are the largest is said of all together"
            )
        replicas = plan.contribution.size - plan.factors_size
        self._by_change = merge.transfer != "fp32"
        self._exact = not self._by_change and kept(replicas, merge) == replicas
        self._packings = tuple(Packing(each, merge, dtype) for each in self.parts)
        self._places = tuple(_places(plan, each) for each in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(packing.size for packing in self._packings)

    def encode(self, contribution: Tensor, reference: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Packs a contribution.

        Args:
            contribution: flat, in the plan's contribution layout.
            reference: flat factors; None where there are none yet, or B' = 0.

        Returns:
            A buffer (uint8, flat, on the contribution's device) for each group, and the contribution as receivers will decode
            it, bit for bit (on one kind of device). In fp32, without top-k, both may be the contribution's own memory.

        Raises:
            ValueError: a tensor has another size or type than the plan's.
        """
        self._check("contribution", contribution, self.plan.contribution.size)
        self._check("reference", reference, self.plan.factors_size)
        contribution = contribution.contiguous()
        if self._exact:
            return tuple(_taken(contribution, places).view(torch.uint8) for places in self._places), contribution
        buffers = tuple(
            packing.encode([contribution[at] for at in places], self._references(reference, places), contribution.device)
            for packing, places in zip(self._packings, self._places, strict=True)
        )
        return buffers, self.decode(dict(enumerate(buffers)), reference)

    def decode(self, buffers: Mapping[int, Tensor], reference: Tensor | None) -> Tensor:
        """The whole contribution, flat, from the buffers of all groups by number. In fp32 it may be a buffer's memory.

        Raises:
            ValueError: a buffer is missing or malformed, or the reference is of another size or type.
        """
        self._check("reference", reference, self.plan.factors_size)
        if set(buffers) != set(range(len(self.groups))):
            raise ValueError(f"expected the buffers of groups 0 to {len(self.groups) - 1}, found {sorted(buffers)}")
        if self._exact and len(buffers) == 1:
            return self.decode_group(0, buffers[0], None)
        out = torch.empty(self.plan.contribution.size, dtype=self.dtype, device=buffers[0].device)
        for index, places in enumerate(self._places):
            self._packings[index].decode(buffers[index], self._references(reference, places), [out[at] for at in places])
        return out

    def decode_group(self, index: int, buffer: Tensor, reference: Tensor | None) -> Tensor:
        """One group's part of the contribution, flat, in the layout `parts[index].contribution`.

        Args:
            reference: the group's own part of it, flat (`take_factors`); not used in fp32.

        Raises:
            ValueError: the buffer is malformed, or the reference is of another size or type.
        """
        packing, own = self._packings[index], self.parts[index]
        self._check("reference", reference, own.factors_size)
        if self._exact:
            return packing.checked(buffer).view(self.dtype)
        out = torch.empty(own.contribution.size, dtype=self.dtype, device=buffer.device)
        places = _places(own, own)
        packing.decode(buffer, self._references(reference, places), [out[at] for at in places])
        return out

    def take(self, index: int, contribution: Tensor) -> Tensor:
        """The group's part of a whole flat contribution, in the layout `parts[index].contribution`; a view where it can be."""
        return _taken(contribution, self._places[index])

    def take_factors(self, index: int, factors: Tensor) -> Tensor:
        """The group's part of whole flat factors (a reference), which lie first in its contribution; a view where it can be."""
        return _taken(factors, self._places[index][: len(self.parts[index].adapted)])

    def _references(self, reference: Tensor | None, places: Sequence[slice]) -> list[Tensor | None]:
        """What each segment travels as the change from: factors have a reference; replica changes, which lie behind, none."""
        if reference is None or not self._by_change:
            return [None] * len(places)
        return [reference[at] if at.stop <= len(reference) else None for at in places]

    def _check(self, what: str, tensor: Tensor | None, size: int) -> None:
        if tensor is not None and (tensor.shape != (size,) or tensor.dtype != self.dtype):
            found = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"expected a flat {what} of {size} elements of {self.dtype}, found {found}")


def least_bytes(plan: Plan, merge: MergeConfig) -> int:
    """The fewest bytes of a contribution in its format: all values that travel, and which of the replica elements do.

    Counts no scales.
    """
    replicas = plan.contribution.size - plan.factors_size
    count = kept(replicas, merge)
    width = {"fp32": 4, "bf16": 2, "int8": 1}[merge.transfer]
    return width * (plan.factors_size + count) + where_bytes(replicas, count)


def _places(whole: Plan, own: Plan) -> tuple[slice, ...]:
    """Where each adapted weight's factors, then the replicas, of a part lie in the whole contribution; adjacent each."""
    starts = {e.name: e.offset for e in whole.contribution.entries}
    places = [slice(starts[a.a], starts[a.a] + a.rank * sum(a.matrix)) for a in own.adapted]
    size = own.contribution.size - own.factors_size
    return (*places, *[slice(whole.factors_size, whole.factors_size + size)] * bool(size))


def _taken(flat: Tensor, places: Sequence[slice]) -> Tensor:
    """These pieces of a flat tensor, end to end: a view where they lie so."""
    if all(a.stop == b.start for a, b in pairwise(places)):
        return flat[places[0].start : places[-1].stop] if places else flat[:0]
    return torch.cat([flat[at] for at in places])
