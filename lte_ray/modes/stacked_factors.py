"""The factors of all heads for one main weight, stacked along a first dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_stored
from lte_ray.modes.arithmetic import DrawState, add_to_weight, are_equal, draw_head_a, without_autocast


class StackedFactors(nn.Module):
    """A (H x r x in) and B (H x out x r) of H heads, and the reference A', B': what the main weight holds of each head.

    Ranks may differ by head: rows of A and columns of B beyond a head's rank are zero, get no gradient, and stay zero. A is
    drawn from (seed, head, name) as Ray heads draw it; B starts at zero. Layers that share a weight share its factors.

    Args:
        specs: each head's entry in its plan.
        like: a tensor of the wanted type and device.
        seed: seed of the draw.
        reset: "B" if a merge sets B to zero. The reference then stays zero and isn't computed with.
    """

    scales: Tensor
    prev_lora_A_weight: Tensor  # noqa: N815  # A and B are what the field calls them
    prev_lora_B_weight: Tensor  # noqa: N815

    def __init__(self, specs: Sequence[Adapted], like: Tensor, seed: int, reset: str) -> None:
        super().__init__()
        self.specs, self.reset, self.draws = tuple(specs), reset, DrawState(seed, like.device)
        heads, rank, (out_features, in_features) = len(specs), max(s.rank for s in specs), specs[0].matrix
        self.lora_A_weight = nn.Parameter(like.new_zeros(heads, rank, in_features))
        self.lora_B_weight = nn.Parameter(like.new_zeros(heads, out_features, rank))
        self.register_buffer("prev_lora_A_weight", torch.zeros_like(self.lora_A_weight))
        self.register_buffer("prev_lora_B_weight", torch.zeros_like(self.lora_B_weight))
        self.register_buffer("scales", self._make_scales(), persistent=False)
        self._draw(seed, 0)

    @property
    def scaling(self) -> float | tuple[float, ...]:
        """s, or a tuple of each head's s if they differ."""
        scalings = tuple(s.scaling for s in self.specs)
        return scalings[0] if len(set(scalings)) == 1 else scalings

    def redraw(self) -> None:
        """Draws A again; B and the reference become zero."""
        self._draw(*self.draws.advance())

    def signed_pairs(self) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of all heads, joined along the rank: their product is B A - B' A'."""
        a, b = self.lora_A_weight, self.lora_B_weight
        if self.reset == "B":
            return a, b
        return torch.cat([a, self.prev_lora_A_weight], 1), torch.cat([b, -self.prev_lora_B_weight], 2)

    def signed_pair(self, head: int) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of one head."""
        rank = self.specs[head].rank
        a, b = self.lora_A_weight[head, :rank], self.lora_B_weight[head, :, :rank]
        if self.reset == "B":
            return a, b
        return (
            torch.cat([a, self.prev_lora_A_weight[head, :rank]]),
            torch.cat([b, -self.prev_lora_B_weight[head, :, :rank]], 1),
        )

    def vector_change(self, head: int) -> Tensor:
        """s (B A - B' A') of one head, for a weight that is a vector (d)."""
        a, b = self.signed_pair(head)
        return (b @ a)[:, 0] * self.specs[head].scaling

    def vector_changes(self) -> Tensor:
        """s (B A - B' A') of all heads (H x d), for a weight that is a vector (d)."""
        a, b = self.signed_pairs()
        return self.scale((b @ a)[:, :, 0])

    def scale(self, tensor: Tensor) -> Tensor:
        """A tensor (H x ...) times each head's s."""
        scales = self.scales.view(-1, *[1] * (tensor.dim() - 1))
        return tensor * self.scaling if isinstance(self.scaling, float) else (tensor * scales).to(tensor.dtype)

    def mean_pair(self) -> tuple[Tensor, Tensor]:
        """(A (H r x in), B (out x H r)), whose product is (1/H) sum_h s_h B_h A_h."""
        b = self.scale(self.lora_B_weight) / len(self.specs)
        return self.lora_A_weight.flatten(0, 1), b.movedim(0, 1).flatten(1)

    def mean_vector(self) -> Tensor:
        """(1/H) sum_h s_h B_h A_h, for a weight that is a vector (d)."""
        a, b = self.mean_pair()
        return (b @ a)[:, 0]

    def weight_with_mean(self, weight: Tensor) -> Tensor:
        """weight + (1/H) sum_h s_h B_h A_h as a new tensor."""
        result = weight.detach().clone(memory_format=torch.contiguous_format)
        with without_autocast(weight.device):
            a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in self.mean_pair())
            change = as_stored(self.specs[0], b @ a)
        return (result.to(change.dtype) + change).to(weight.dtype)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """weight += (1/H) sum_h s_h (B_h A_h - B'_h A'_h). The reference becomes the factors; with `reset` "B", B becomes zero.

        A second call right after the first adds nothing, so each of the layers that share a weight may call it.
        """
        if self.reset != "B" and are_equal(
            (self.lora_A_weight, self.prev_lora_A_weight), (self.lora_B_weight, self.prev_lora_B_weight)
        ):
            return
        count, terms = len(self.specs), []
        for head, spec in enumerate(self.specs):
            c = spec.scaling / count
            terms.append((c, self.lora_B_weight[head], self.lora_A_weight[head]))
            if self.reset != "B":
                terms.append((-c, self.prev_lora_B_weight[head], self.prev_lora_A_weight[head]))
        add_to_weight(self.specs[0], weight, terms)
        if self.reset == "B":
            self.lora_B_weight.zero_()
        else:
            self.prev_lora_A_weight.copy_(self.lora_A_weight)
            self.prev_lora_B_weight.copy_(self.lora_B_weight)

    def _make_scales(self) -> Tensor:
        """Each head's s (H), in the factors' type, or in float32 if that type has fewer bits."""
        dtype = torch.promote_types(self.lora_A_weight.dtype, torch.float32)
        return torch.tensor([s.scaling for s in self.specs], dtype=dtype, device=self.lora_A_weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self._make_scales()  # from the exact numbers: `fn` may have rounded them to another type
        return self

    @torch.no_grad()
    def _draw(self, seed: int, draws: int) -> None:
        for tensor in (self.lora_A_weight, self.lora_B_weight, self.prev_lora_A_weight, self.prev_lora_B_weight):
            tensor.zero_()
        for head, spec in enumerate(self.specs):
            self.lora_A_weight[head, : spec.rank].copy_(draw_head_a(spec, seed, head, draws))
