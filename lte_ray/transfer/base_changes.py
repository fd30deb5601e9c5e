"""The change from one version of a base to the next on the wire, rounded to bf16 or to int8 in blocks.

    exact      running statistics, in the type of merging: a rounded variance could become negative
    values     of all other entries, in the layout's order, in bf16 or int8
    steps      int8 only: one fp32 step per block of 512 consecutive values; each entry starts a new block

The fields follow each other, wider numbers first. There is no header: both sides know the plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte_ray.layout import Plan
from lte_ray.transfer.packing import BufferFields, count_steps, decode_values, encode_values, lengths, scatter, value_type


class ChangePacking:
    """Packs the change of a base, or of a group's part of it, into one buffer, and unpacks it.

    Args:
        plan: of the base or the group's part.
        transfer: bf16 or int8.
        dtype: of the base.

    Attributes:
        size: bytes of the buffer.
    """

    def __init__(self, plan: Plan, transfer: str, dtype: torch.dtype = torch.float32) -> None:
        statistics = {replica.name for replica in plan.replicas if replica.buffer}
        places = [(entry.name in statistics, slice(entry.offset, entry.offset + entry.size)) for entry in plan.base.entries]
        self._exact = [place for exact, place in places if exact]
        self._rounded = [place for exact, place in places if not exact]
        self._counts = lengths(self._rounded)
        self._steps = count_steps(transfer, self._counts)
        self._transfer, self._dtype, self._elements = transfer, dtype, plan.base.size
        self._fields = BufferFields(
            exact=(dtype, sum(lengths(self._exact))),
            values=(value_type(transfer, dtype), sum(self._counts)),
            steps=(torch.float32, sum(self._steps)),
        )
        self.size = self._fields.size

    def encode(self, change: Tensor) -> Tensor:
        """Packs a change, flat in the base layout, into a new buffer (uint8) on its device."""
        buffer = torch.empty(self.size, dtype=torch.uint8, device=change.device)
        if self._exact:
            torch.cat([change[place] for place in self._exact], out=self._fields.view(buffer, "exact"))
        for place, values, steps in self._segments(buffer):
            encode_values(change[place], None, values, steps)
        return buffer

    def decode(self, buffer: Tensor) -> Tensor:
        """Returns the change that `encode` packed, rounded, as a new flat tensor.

        Raises:
            ValueError: the buffer has the wrong length or type.
        """
        buffer = self._fields.check_buffer(buffer, "change", self._transfer)
        change = torch.empty(self._elements, dtype=self._dtype, device=buffer.device)
        scatter(self._fields.view(buffer, "exact"), change, self._exact)
        for place, values, steps in self._segments(buffer):
            decode_values(values, steps, None, change[place])
        return change

    def _segments(self, buffer: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        """Each rounded entry's place in the base, and views of its values and steps in the buffer."""
        values = torch.split(self._fields.view(buffer, "values"), self._counts)
        steps = torch.split(self._fields.view(buffer, "steps"), self._steps)
        return list(zip(self._rounded, values, steps, strict=True))
