"""A worker to start from: replace its model, its data and its loss by yours. `lte-ray new` copies it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.data import loader


@dataclass
class Template:
    """Learns a function of random numbers. Each field is a flag: `width` is --worker.width, and --help shows its text."""

    width: int = 64
    """Width of the network."""
    batch_size: int = 32
    """Samples in one head's batch."""

    def build_model(self) -> nn.Module:
        """Returns the model, on the CPU. Each process calls this with the same seed, so all begin with equal weights."""
        return nn.Sequential(nn.Linear(16, self.width), nn.GELU(), nn.Linear(self.width, 16))

    def samples(self, seed: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Your data: anything with a length and an index, such as a torch Dataset or a data set of Hugging Face."""
        inputs = torch.randn(size, 16, generator=torch.Generator().manual_seed(seed))
        return list(zip(inputs, inputs.roll(1, dims=1).sin(), strict=True))

    def train_batches(self, shard: Shard) -> Iterator[list[Tensor]]:
        """Yields one head's batches. `loader` gives each head its own part, and continues exactly after a resume."""
        return loader(self.samples(seed=0, size=4096), shard, self.batch_size)

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Returns the mean loss over the batch. The batch is on the model's device."""
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns figures of the merged weights. Policies and --keep-best minimize the first."""
        device = next(model.parameters()).device
        inputs, targets = (torch.stack(part).to(device) for part in zip(*self.samples(seed=1, size=512), strict=True))
        return {"validation_loss": F.mse_loss(model(inputs), targets).item()}

    # Without a build_optimizer, --optimizer, --lr and --schedule choose; the defaults suit training from scratch. To fine-tune
    # a pretrained model, take a tenth of these rates:
    # default_lr_factor = 0.1
