"""One head's linear layer: the frozen main weight with the reference folded in, and trainable factors."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Factors(nn.Module):
    """The factors of one main weight, W~ + s B A with A (rank x in) and B (out x rank); B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.A = nn.Parameter(weight.new_zeros(rank, in_features))
        self.B = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """s (x A^T) B^T; x is (..., in), the result (..., out)."""
        return F.linear(F.linear(x, self.A) * self.scaling, self.B)


class LTELinear(nn.Module):
    """y = x W~^T + b + s (x A^T) B^T, the linear layer of one head (LTE, arXiv 2402.16828, eq. 5-6).

    W~ = W_v - s B' A' is this head's own copy of the main weight: base version v less what v already holds of this
    head (the reference A', B'). It gets no gradient. It stays a parameter of the same name and shape as in the
    `nn.Linear` that it replaces, and so does the bias, which trains as a replica.

    Args:
        linear: the layer to replace; its weight and bias are taken over, not copied.
        factors: the factors, shared by all layers that share the weight.
    """

    def __init__(self, linear: nn.Linear, factors: Factors) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.bias = linear.bias
        self.lora = factors
        self.train(linear.training)
        for name in HOOKS:  # what the user hung on the layer goes on working
            setattr(self, name, getattr(linear, name))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.weight, self.bias) + self.lora(x)
        return y

    def extra_repr(self) -> str:
        rank = self.lora.A.shape[0]
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}, s={self.lora.scaling:g}"


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
