"""Random changes of training images that keep their labels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def augment(
    images: Tensor, random: np.random.Generator, *, shift: int = 0, flip: bool = False, min_area: float = 1.0
) -> Tensor:
    """Shifts, mirrors and crops each image at random, and keeps the size.

    Args:
        images: (n, channels, height, width), unsigned bytes.
        random: draws all random numbers, so that the same state gives the same images.
        shift: largest shift in pixels, in both directions; what comes into view is 0.
        flip: mirror half of the images, left to right.
        min_area: area of the smallest crop, as a fraction of the image's. A crop of this area or more, with an aspect ratio
            between 3:4 and 4:3, is enlarged to the whole size (bilinear); 1: no crops.

    Returns:
        Images of the same shape and type.
    """
    if not (shift or flip or min_area < 1):
        return images
    n, _, height, width = images.shape
    area = random.uniform(min_area, 1.0, n)
    ratio = np.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3), n)) if min_area < 1 else np.ones(n)
    rows, columns = np.minimum(1.0, np.sqrt(area / ratio)), np.minimum(1.0, np.sqrt(area * ratio))
    down, right = random.integers(-shift, shift + 1, (2, n))
    theta = np.zeros((n, 2, 3))  # maps the result's coordinates to the image's; both reach from -1 to 1
    theta[:, 0, 0] = columns * np.where(flip & (random.random(n) < 0.5), -1.0, 1.0)
    theta[:, 1, 1] = rows
    theta[:, 0, 2] = random.uniform(-1.0, 1.0, n) * (1 - columns) - 2 * right / width
    theta[:, 1, 2] = random.uniform(-1.0, 1.0, n) * (1 - rows) - 2 * down / height
    grid = F.affine_grid(torch.from_numpy(theta).float(), list(images.shape), align_corners=False)
    outside = "zeros" if shift else "border"  # an enlarged crop reads half a pixel beyond the image's edge
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)
