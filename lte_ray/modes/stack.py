"""The factors of all heads for one main weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lte_ray.adapters.factors import draw_a
from lte_ray.layout import Adapted
from lte_ray.merging.flat import as_matrix, as_stored
from lte_ray.merging.products import add_products


class Stack(nn.Module):
    """A (H x r x in) and B (H x out x r) of H heads, and the reference A', B' that the main weight holds of each.

    Ranks may differ by head: the rest up to the largest is zero in A and in B, gets no gradient and stays so. A is drawn from
    (seed, head, name) as the Ray heads' is, B starts at zero. Layers that share a weight share its stack.

    Args:
        specs: each head's entry in its plan.
        like: a tensor of the wanted type and device.
        seed: of the draw.
        reset: "B" where a merge sets B to zero: the reference stays zero then and isn't computed.
    """

    scales: Tensor
    prev_lora_A_weight: Tensor  # noqa: N815  # A and B are what the field calls them
    prev_lora_B_weight: Tensor  # noqa: N815

    def __init__(self, specs: Sequence[Adapted], like: Tensor, seed: int, reset: str) -> None:
        super().__init__()
        self.specs, self.seed, self.reset, self.draws = tuple(specs), seed, reset, 0
        heads, rank, (out_features, in_features) = len(specs), max(s.rank for s in specs), specs[0].matrix
        self.lora_A_weight = nn.Parameter(like.new_zeros(heads, rank, in_features))
        self.lora_B_weight = nn.Parameter(like.new_zeros(heads, out_features, rank))
        self.register_buffer("prev_lora_A_weight", torch.zeros_like(self.lora_A_weight))
        self.register_buffer("prev_lora_B_weight", torch.zeros_like(self.lora_B_weight))
        self.register_buffer("scales", like.new_tensor([s.scaling for s in specs]), persistent=False)
        self.draw()

    @property
    def scaling(self) -> float | tuple[float, ...]:
        """s, or each head's where they differ."""
        scalings = tuple(s.scaling for s in self.specs)
        return scalings[0] if len(set(scalings)) == 1 else scalings

    @torch.no_grad()
    def draw(self) -> None:
        """Draws A, another one each time; B and the reference become zero."""
        for tensor in (self.lora_A_weight, self.lora_B_weight, self.prev_lora_A_weight, self.prev_lora_B_weight):
            tensor.zero_()
        for head, spec in enumerate(self.specs):
            self.lora_A_weight[head, : spec.rank].copy_(drawn(spec, self.seed, head, self.draws))
        self.draws += 1

    def pairs(self) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of all heads, along the rank: one product is B A - B' A'."""
        a, b = self.lora_A_weight, self.lora_B_weight
        if self.reset == "B":
            return a, b
        return torch.cat([a, self.prev_lora_A_weight], 1), torch.cat([b, -self.prev_lora_B_weight], 2)

    def pair(self, head: int) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of one head."""
        rank = self.specs[head].rank
        a, b = self.lora_A_weight[head, :rank], self.lora_B_weight[head, :, :rank]
        if self.reset == "B":
            return a, b
        return (
            torch.cat([a, self.prev_lora_A_weight[head, :rank]]),
            torch.cat([b, -self.prev_lora_B_weight[head, :, :rank]], 1),
        )

    def vector(self, head: int) -> Tensor:
        """s (B A - B' A') of one head, of a weight that is a vector."""
        a, b = self.pair(head)
        return (b @ a)[:, 0] * self.specs[head].scaling

    def vectors(self) -> Tensor:
        """s (B A - B' A') of all heads (H x d), of a weight that is a vector."""
        a, b = self.pairs()
        return (b @ a)[:, :, 0] * self.scales[:, None]

    def average(self) -> tuple[Tensor, Tensor]:
        """(A (H r x in), B (out x H r)), whose product is (1/H) sum_h s_h B_h A_h."""
        b = self.lora_B_weight * (self.scales / len(self.specs))[:, None, None]
        return self.lora_A_weight.flatten(0, 1), b.movedim(0, 1).flatten(1)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """weight += (1/H) sum_h s_h (B_h A_h - B'_h A'_h); the reference becomes the factors, or B zero (`reset`).

        A second call right after adds nothing, so layers that share the weight may each call it.
        """
        count, terms = len(self.specs), []
        for head, spec in enumerate(self.specs):
            c = spec.scaling / count
            terms.append((c, self.lora_B_weight[head], self.lora_A_weight[head]))
            if self.reset != "B":
                terms.append((-c, self.prev_lora_B_weight[head], self.prev_lora_A_weight[head]))
        merge_terms(self.specs[0], weight, terms)
        if self.reset == "B":
            self.lora_B_weight.zero_()
        else:
            self.prev_lora_A_weight.copy_(self.lora_A_weight)
            self.prev_lora_B_weight.copy_(self.lora_B_weight)


def drawn(spec: Adapted, seed: int, head: int, draws: int) -> Tensor:
    """The A that a head draws for the first time (draws = 0) or again."""
    return draw_a((spec.rank, spec.matrix[1]), seed, head, f"{spec.name}@{draws}" if draws else spec.name)


def merge_terms(spec: Adapted, weight: Tensor, terms: Sequence[tuple[float, Tensor, Tensor]]) -> None:
    """weight += sum_k c_k B_k A_k for a stored weight, computed in float32 at least and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype).contiguous()
    add_products(as_matrix(spec, exact), [(c, b.to(exact), a.to(exact)) for c, b, a in terms])
    if exact.data_ptr() != weight.data_ptr():
        weight.copy_(exact)


def averaged(spec: Adapted, weight: Tensor, stack: Stack) -> Tensor:
    """weight + (1/H) sum_h s_h B_h A_h as a new tensor."""
    result = weight.detach().clone(memory_format=torch.contiguous_format)
    a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in stack.average())
    change = as_stored(spec, b @ a)
    return (result.to(change.dtype) + change).to(weight.dtype)
