"""The factors of one main weight."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted


class Factors(nn.Module):
    """A (r x in) and B (out x r) of one main weight, whose effective value is W~ + s B A; B starts at zero.

    If heads share the main weight, or it is quantized, the reference can't be folded into it. Then W~ = W, and this module
    stores the reference A', B' too, so that the layer adds s (B A - B' A').

    Args:
        spec: rank, scaling and shape.
        like: a tensor with the device and type to use; factors of 16-bit weights are float32, whose rounding is below a step.
        separate_reference: whether to store the reference.
    """

    reference_A: Tensor | None  # noqa: N815  # A and B are the names in the LoRA literature
    reference_B: Tensor | None  # noqa: N815

    def __init__(self, spec: Adapted, like: Tensor, *, separate_reference: bool = False) -> None:
        super().__init__()
        out_features, in_features = spec.matrix
        dtype = trained_dtype(like)
        self.A = nn.Parameter(like.new_zeros(spec.rank, in_features, dtype=dtype))
        self.B = nn.Parameter(like.new_zeros(out_features, spec.rank, dtype=dtype))
        self.scaling, self.separate_reference, self._reserved = spec.scaling, separate_reference, False
        self.register_buffer("reference_A", None, persistent=False)
        self.register_buffer("reference_B", None, persistent=False)

    def effective_pair(self) -> tuple[Tensor, Tensor]:
        """Returns (A, B), or ([A; A'], [B, -B']) with a separate reference: s times their product is what the layer adds."""
        if self.reference_A is None or self.reference_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.reference_A]), torch.cat([self.B, -self.reference_B], dim=1)

    def vector_change(self) -> Tensor:
        """Returns s B A (- s B' A') of a weight that is a vector."""
        a, b = self.effective_pair()
        return (b @ a)[:, 0] * self.scaling

    @torch.no_grad()
    def set_reference(self, a: Tensor | None, b: Tensor | None) -> None:
        """Sets the reference A', B', without a copy if possible; None if B' = 0."""
        assert self.separate_reference
        if self._reserved:
            assert self.reference_A is not None and self.reference_B is not None
            self.reference_A.copy_(self.A if a is None else a)
            self.reference_B.zero_() if b is None else self.reference_B.copy_(b)
        else:
            self.reference_A = None if a is None else a.to(self.A.dtype)
            self.reference_B = None if b is None else b.to(self.B.dtype)

    @torch.no_grad()
    def reserve_reference(self) -> None:
        """Allocates memory for the reference, which it uses from now on, so that it can be a slice of a stacked tensor."""
        assert self.separate_reference
        self.reference_A, self.reference_B = torch.zeros_like(self.A), torch.zeros_like(self.B)
        self._reserved = True


def trained_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which what trains for a parameter is kept: float32 for 16-bit types, otherwise its own."""
    return torch.promote_types(parameter.dtype, torch.float32) if parameter.dtype.itemsize < 4 else parameter.dtype


def draw_initial_a(shape: tuple[int, int], seed: int, head: int, name: str) -> Tensor:
    """Draws the initial A (r x in) of one head and layer: semi-orthogonal rows times sqrt(in / r), float32.

    Depends only on (seed, head, layer name), so that heads explore different directions, and a head that is rebuilt anywhere
    gets the same A. The factor sqrt(in / r) is that of the LTE authors' code.
    """
    key = hashlib.sha256(f"{seed}/{head}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    a = torch.empty(shape)
    nn.init.orthogonal_(a, gain=math.sqrt(shape[1] / shape[0]), generator=generator)
    return a
