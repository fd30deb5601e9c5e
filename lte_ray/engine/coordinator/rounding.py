"""A base that moves by rounded changes, and what they have left out so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.config.merge import ROUNDED_CHANGES
from lte_ray.layout import Plan
from lte_ray.transfer.base_changes import ChangePacking


@dataclass
class Rounding:
    """Moves a base by rounded changes, so that heads that add the same changes have the same base, bit for bit.

    Merges add to the residual R instead of the base W. Then W += Q(R) and R -= Q(R): what Q rounds away is part of the next
    change (error feedback).

    Attributes:
        packing: Q.
        residual: R, as the base.
        change: the last Q(R), as it is sent; None before there is one.
    """

    packing: ChangePacking
    residual: Tensor
    change: Tensor | None = None

    def move(self, base: Tensor) -> None:
        """Moves what can be sent of the residual into the base, in place."""
        self.change = self.packing.encode(self.residual)
        decoded = self.packing.decode(self.change)
        base += decoded
        self.residual -= decoded

    def copy(self) -> Rounding:
        """Returns one that can be changed alone."""
        return Rounding(self.packing, self.residual.clone(), self.change)


def make_rounding(plan: Plan, send_down: str, base: Tensor, residual: Tensor | None) -> Rounding | None:
    """Returns what rounds the changes of a base with this plan; None if they aren't rounded.

    Args:
        plan: of the base or a group's part of it.
        send_down: as `MergeConfig.send_down`.
        base: flat.
        residual: where it begins, taken over; None for 0.
    """
    if send_down not in ROUNDED_CHANGES:
        return None
    residual = torch.zeros_like(base) if residual is None else residual
    return Rounding(ChangePacking(plan, send_down, base.dtype), residual)
