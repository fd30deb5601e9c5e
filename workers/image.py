"""Image classification on your own folder: the data decide the number of classes, you choose the network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from torch import nn

from lte_ray.data import ImageSet, cached_images, local_copy
from lte_ray.errors import DataError, WorkerError

from .images import ImageClassifier
from .mixer import Mixer
from .resnet import ResNet
from .vit import ViT

NETWORKS = {"vit": ViT, "resnet": ResNet, "mixer": Mixer}


@dataclass
class Image(ImageClassifier):
    """Classifies images with a ViT, a ResNet or an MLP-Mixer; `evaluate` returns loss and accuracy on the test split."""

    network: Literal["vit", "resnet", "mixer"] = "vit"
    """The network, trained from scratch."""
    image_size: int = 64
    """Height and width of the images; others are resized and cut to their center."""
    channels: int = 3
    """Channels of the images: 1 (gray) or 3 (RGB)."""
    classes: int = 0
    """Number of classes; 0: as many as the training split has."""
    width: int = 0
    """Width of the network; 0: its own default."""
    depth: int = 0
    """Blocks of a ViT or an MLP-Mixer, stages of a ResNet; 0: its own default."""
    patch: int = 0
    """Height and width of a patch of a ViT or an MLP-Mixer; 0: about an eighth of the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            raise WorkerError(f"--worker.network is {self.network!r}, but it must be one of: {', '.join(NETWORKS)}.")

    def number_of_classes(self) -> int:
        if not self.data:
            raise DataError("--worker.data is missing. Give the folder that has the images.")
        if self.classes:
            return self.classes
        folder = Path(local_copy(self.data))
        if not folder.is_dir():
            return 1  # `images` says what is missing
        data = cached_images(folder, (self.channels, self.image_size, self.image_size))
        classes = int(data["train"].labels.max()) + 1
        if classes < 2:
            raise DataError(f"{self.data} has images of one class only, so there is nothing to learn. Add another class.")
        return classes

    def images(self, split: str) -> ImageSet:
        return self.of_network().images(split)

    def of_network(self) -> ImageClassifier:
        """The worker of the network, with these settings."""
        kind = NETWORKS[self.network]
        settings = {field.name: getattr(self, field.name) for field in fields(ImageClassifier)}
        settings["classes"] = self.number_of_classes()
        given = {"width": self.width, "stages" if self.network == "resnet" else "depth": self.depth}
        if self.network != "resnet":
            given["patch"] = self.patch or nearest_divisor(self.image_size)
        return kind(**settings, **{name: value for name, value in given.items() if value})

    def build_model(self) -> nn.Module:
        return self.of_network().build_model()


def nearest_divisor(size: int) -> int:
    """The divisor of an image's size that is nearest to its eighth, and at least 4 if there is one."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return min((n for n in divisors if n >= 4), key=lambda n: abs(n - size / 8), default=1)
