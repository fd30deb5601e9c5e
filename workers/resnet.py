"""A residual network of convolutions, from scratch, on Fashion-MNIST or another data set of images (`workers/images.py`).

It normalizes groups of channels within each image, not the batch: the batches of heads are small, and the running statistics of
batch normalization would belong to the heads' weights, not to their average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .images import ImageClassifier, check_multiple, initialize


class Block(nn.Module):
    """Pre-activation residual block of two 3 x 3 convolutions. Its norms have no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, affine=False) for width in (inputs, outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active))))


class ResidualNetwork(nn.Module):
    """(batch, channels, size, size) images to (batch, classes) logits. Each stage halves the size and doubles the width."""

    def __init__(self, channels: int, classes: int, stride: int, width: int, stages: int, blocks: int, groups: int) -> None:
        super().__init__()
        kernel = max(3, 2 * stride - 1)
        self.stem = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        widths = [width, *(width * 2**stage for stage in range(stages) for _ in range(blocks))]
        strides = [2 if stage and not block else 1 for stage in range(stages) for block in range(blocks)]
        self.blocks = nn.Sequential(*(Block(*sizes, groups) for sizes in zip(widths[:-1], widths[1:], strides, strict=True)))
        self.norm = nn.GroupNorm(groups, widths[-1], affine=False)
        self.logits = nn.Linear(widths[-1], classes)
        initialize(self, last_of_branch=("conv2",), branches=stages * blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.logits(x.mean((2, 3)))


@dataclass
class ResNet(ImageClassifier):
    """A residual network that classifies images; `evaluate` returns the loss and the accuracy on the test split."""

    stride: int = 2
    """Stride of the first convolution, in pixels: 1 keeps the size of the images, 4 suits large ones."""
    width: int = 32
    """Channels of the first stage; each further stage has twice as many, at half the size."""
    stages: int = 3
    """Number of stages."""
    blocks: int = 1
    """Residual blocks in each stage."""
    groups: int = 8
    """Groups of channels that are normalized together."""

    def build_model(self) -> nn.Module:
        check_multiple("width", self.width, "groups", self.groups)
        return ResidualNetwork(self.channels, self.classes, self.stride, self.width, self.stages, self.blocks, self.groups)
