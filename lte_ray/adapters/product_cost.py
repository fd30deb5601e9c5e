"""Whether a layer computes W~ x + s B (A x), or (W~ + s B A) x: the one that takes fewer multiplications in a training step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted


def forms_weight(layer: nn.Module, spec: Adapted, x: Tensor, stored: Tensor, rank: int) -> bool:
    """Whether the layer computes with the effective weight.

    With m = in out and p = r (in + out), the product kept apart takes 2 m + 3 p multiplications for each position of the input:
    m for W~ x, m for the gradient of x, and p each for B (A x), its gradient of x, and the gradients of A and B. The effective
    weight takes 3 m, since it needs a gradient of its own, and once 3 m r, to be formed and to give A and B their gradients. So
    small layers with a large rank form it, such as 128 x 128 with rank 64, and those of large models don't.

    Weights of 16 bits, and mixed precision, would round W~ + s B A. So they keep the product apart.

    Args:
        layer: of a linear or convolutional kind.
        spec: of its weight.
        x: its input.
        stored: the main weight.
        rank: of the product, twice the layer's if there is a separate reference.
    """
    if stored.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
        return False
    out_features, in_features = spec.matrix
    groups, positions = 1, x.numel() / in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        groups, positions = layer.groups, x.numel() / layer.in_channels / math.prod(layer.stride)
    dense, product = out_features * in_features, rank * (groups * in_features + out_features)
    return positions * (3 * product - dense) > 3 * dense * rank
