"""An MLP-Mixer, from scratch, on Fashion-MNIST or another data set of images (`workers/images.py`).

Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", arXiv 2105.01601.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .images import ImageClassifier, check_multiple, initialize


class MLP(nn.Module):
    """Two linear layers, on the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch. Its norms have no parameters."""

    def __init__(self, patches: int, width: int, patch_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.mix_patches, self.mix_channels = MLP(patches, patch_hidden), MLP(width, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm2(x))


class MLPMixer(nn.Module):
    """(batch, channels, size, size) images to (batch, classes) logits, from the mean over all patches."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        classes: int,
        patch: int,
        width: int,
        depth: int,
        patch_hidden: int,
        channel_hidden: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        count = (image_size // patch) ** 2
        self.blocks = nn.ModuleList(Block(count, width, patch_hidden, channel_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.logits = nn.Linear(width, classes)
        initialize(self, last_of_branch=("down",), branches=2 * depth)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x).mean(1))


@dataclass
class Mixer(ImageClassifier):
    """An MLP-Mixer that classifies images; `evaluate` returns the loss and the accuracy on the test split."""

    patch: int = 7
    """Height and width of a patch, in pixels."""
    width: int = 64
    """Width of the residual stream: channels of each patch."""
    depth: int = 4
    """Number of blocks."""
    patch_hidden: int = 64
    """Hidden width of the MLP over the patches."""
    channel_hidden: int = 256
    """Hidden width of the MLP over the channels."""

    def build_model(self) -> nn.Module:
        check_multiple("image_size", self.image_size, "patch", self.patch)
        return MLPMixer(
            self.image_size,
            self.channels,
            self.classes,
            self.patch,
            self.width,
            self.depth,
            self.patch_hidden,
            self.channel_hidden,
        )
