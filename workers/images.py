"""What the image workers share: data, loss, evaluation. `vit`, `mixer` and `resnet` add their models.

The data are Fashion-MNIST by default: 60,000 gray images of clothes in ten classes, 28 x 28 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.data import ImageSet, augment, cached_images, local_copy
from lte_ray.errors import DataError, WorkerError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""


@dataclass
class ImageClassifier:
    """Classifies images; `evaluate` returns the loss and the accuracy on the test split. A subclass builds the model.

    The model's input is (batch, channels, size, size), from -1 to 1; its output (batch, classes) logits.
    """

    data: str = ""
    """Folder of a data set: IDX files, Parquet files, or image files in train/CLASS and test/CLASS; or its URI. By default that
    of Debian's package dataset-fashion-mnist."""
    image_size: int = 28
    """Height and width of the images; others are resized and cut to their center."""
    channels: int = 1
    """Channels of the images: 1 (gray) or 3 (RGB)."""
    classes: int = 10
    """Number of classes."""
    shift: int = 0
    """Largest random shift of a training image, in pixels."""
    flip: bool = False
    """Whether half of the training images are mirrored, left to right."""
    min_area: float = 1.0
    """Area of the smallest random crop of a training image, as a fraction of the image's; 1: no crops."""
    test_images: int = 2000
    """Images that `evaluate` uses, spread evenly over the test split; 0: all."""
    batch_size: int = 32
    """Images in one head's batch."""

    def __post_init__(self) -> None:
        if self.data and "://" not in self.data:  # heads may run in other folders
            self.data = str(Path(self.data).expanduser().absolute())
        least = {"image_size": 1, "channels": 1, "classes": 0, "shift": 0, "test_images": 0, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise WorkerError(
                    f"--worker.{name.replace('_', '-')} is {getattr(self, name)}, but it must be at least {value}."
                )

    def images(self, split: str) -> ImageSet:
        """Returns the split "train" or "test".

        Raises:
            DataError: the data are missing, damaged, or of other classes or channels than the settings say.
        """
        folder = Path(local_copy(self.data)) if self.data else FASHION_MNIST
        if not folder.is_dir():
            raise DataError(missing_message(folder))
        data = cached_images(folder, (self.channels, self.image_size, self.image_size))[split]
        if data.labels.max() >= self.classes:
            raise DataError(
                f"{folder} has the label {data.labels.max()}, but there are {self.classes} classes. Set --worker.classes to at "
                f"least {data.labels.max() + 1}."
            )
        return data

    def describe_data(self) -> str:
        return f"{len(self.images('train').labels)} images"

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.images("train")
        for slot, indices in zip(shard.slots(), shard.indices(len(data), self.batch_size), strict=False):
            random = np.random.default_rng([shard.seed, slot])  # so a batch is the same after a resume, and on any head
            images = torch.from_numpy(data.images[indices])
            images = augment(images, random, shift=self.shift, flip=self.flip, min_area=self.min_area)
            yield images, torch.from_numpy(data.labels[indices])

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Returns the model's logits, (n, classes), for unsigned bytes (n, channels, size, size)."""
        return model(images.float() / 127.5 - 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.logits(model, images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        data, device = self.images("test"), next(model.parameters()).device
        count = min(self.test_images or len(data), len(data))
        indices = np.linspace(0, len(data) - 1, count, dtype=np.int64)
        loss = correct = 0.0
        for chunk in np.array_split(indices, math.ceil(count / 250)):
            labels = torch.from_numpy(data.labels[chunk]).to(device)
            logits = self.logits(model, torch.from_numpy(data.images[chunk]).to(device))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += float((logits.argmax(1) == labels).sum())
        return {"loss": loss / count, "accuracy": correct / count}  # the first is what policies and --keep-best minimize


@torch.no_grad()
def initialize(model: nn.Module, last_of_branch: tuple[str, ...], branches: int) -> None:
    """Draws the weights of linear layers and convolutions: normal, of variance 1 / inputs. Biases and the classifier are 0.

    Args:
        model: its classifier is named ``logits``.
        last_of_branch: names of the last layers of residual branches. Their weights are divided by the root of the number of
            branches, so that the sum of all branches is as large in deep models as in shallow ones.
        branches: their number.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            scale = branches**-0.5 if name.endswith(last_of_branch) else float(name != "logits")
            layer.weight.normal_().mul_(scale * layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                layer.bias.zero_()


def check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Raises WorkerError unless one setting of a worker is a multiple of another."""
    if divisor < 1 or value < 1 or value % divisor:
        flags = [f"--worker.{setting.replace('_', '-')}" for setting in (name, of)]
        raise WorkerError(f"{flags[0]} is {value}, but it must be a multiple of {flags[1]}, {divisor}.")


def missing_message(folder: Path) -> str:
    """Says what to do about a data set that isn't there."""
    if folder != FASHION_MNIST:
        return f"--worker.data: there is no folder {folder}. Give the folder that has the images, on every node."
    return (
        f"Fashion-MNIST isn't installed: there is no folder {folder}. On Debian and Ubuntu, install it on every node with "
        "apt-get install dataset-fashion-mnist. Elsewhere, download its four files (train-images-idx3-ubyte.gz, "
        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) from "
        "https://github.com/zalandoresearch/fashion-mnist and give their folder: --worker.data FOLDER."
    )
