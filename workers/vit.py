"""A vision transformer, from scratch, on Fashion-MNIST or another data set of images (`workers/images.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.misc import sinusoidal

from .images import ImageClassifier, check_multiple, initialize


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a 4x MLP. Its norms have no parameters: all that trains has factors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """(batch, channels, size, size) images to (batch, classes) logits, from the mean over all patches.

    Positions are sines and cosines, half of them of the row, half of the column. So no parameter but biases trains without
    factors.
    """

    positions: Tensor

    def __init__(self, image_size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", grid_positions(image_size // patch, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.logits = nn.Linear(width, classes)
        initialize(self, last_of_branch=("out", "down"), branches=2 * depth)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x).mean(1))


def grid_positions(side: int, width: int) -> Tensor:
    """Returns embeddings of a grid's places, in row-major order: (side * side, width), sines and cosines of row and column."""
    rows, columns = sinusoidal(width // 2, side)[0], sinusoidal(width - width // 2, side)[0]
    grid = torch.cat([rows[:, None].expand(-1, side, -1), columns[None].expand(side, -1, -1)], dim=-1)
    return grid.reshape(side * side, width)


@dataclass
class ViT(ImageClassifier):
    """A vision transformer that classifies images; `evaluate` returns the loss and the accuracy on the test split."""

    patch: int = 7
    """Height and width of a patch, in pixels."""
    width: int = 64
    """Width of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    attention_heads: int = 4
    """Attention heads in each block."""

    def build_model(self) -> nn.Module:
        check_multiple("image_size", self.image_size, "patch", self.patch)
        check_multiple("width", self.width, "attention_heads", self.attention_heads)
        return VisionTransformer(
            self.image_size, self.channels, self.classes, self.patch, self.width, self.depth, self.attention_heads
        )
