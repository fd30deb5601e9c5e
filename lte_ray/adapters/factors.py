"""The factors of one main weight."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted


class Factors(nn.Module):
    """A (r x in) and B (out x r) of one main weight, which counts as W~ + s B A; B starts at zero.

    Where the main weight isn't this head's alone, or is quantised, the reference can't be folded into it. Then W~ = W
    and the factors hold the reference A', B' too, so that the layer adds s (B A - B' A').

    Args:
        spec: rank, scaling and shape.
        like: a tensor of the wanted type and device.
        hold: whether they hold the reference.
    """

    reference_A: Tensor | None  # noqa: N815  # A and B are what the field calls them
    reference_B: Tensor | None  # noqa: N815

    def __init__(self, spec: Adapted, like: Tensor, *, hold: bool = False) -> None:
        super().__init__()
        out_features, in_features = spec.matrix
        self.A = nn.Parameter(like.new_zeros(spec.rank, in_features))
        self.B = nn.Parameter(like.new_zeros(out_features, spec.rank))
        self.scaling = spec.scaling
        self.register_buffer("reference_A", torch.zeros_like(self.A) if hold else None, persistent=False)
        self.register_buffer("reference_B", torch.zeros_like(self.B) if hold else None, persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), or ([A; A'], [B, -B']) where the reference is held: their product is what the layer adds, over s."""
        if self.reference_A is None or self.reference_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.reference_A]), torch.cat([self.B, -self.reference_B], dim=1)

    def vector(self) -> Tensor:
        """s B A (- s B' A') of a weight that is a vector."""
        a, b = self.pair()
        return (b @ a)[:, 0] * self.scaling

    @torch.no_grad()
    def set_reference(self, a: Tensor | None, b: Tensor | None) -> None:
        """Takes over the reference A', B'; None where B' = 0."""
        assert self.reference_A is not None and self.reference_B is not None
        if a is None or b is None:
            self.reference_B.zero_()
        else:
            self.reference_A.copy_(a)
            self.reference_B.copy_(b)


def draw_a(shape: tuple[int, int], seed: int, head: int, name: str) -> Tensor:
    """The initial A (r x in) of one head and layer: semi-orthogonal rows times sqrt(in / r), float32.

    Drawn from (seed, head, layer name) alone, so that every head explores other directions, and a head that is
    built again anywhere gets the same A. The factor is that of the authors' code (DESIGN 3.8).
    """
    key = hashlib.sha256(f"{seed}/{head}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    a = torch.empty(shape)
    nn.init.orthogonal_(a, gain=math.sqrt(shape[1] / shape[0]), generator=generator)
    return a
