"""The smallest useful worker: a small network learns to imitate a random one. It takes seconds on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width))


@dataclass
class Regression:
    """Fits the outputs of a fixed random network on random inputs."""

    width: int = 32
    """Number of inputs and of outputs of both networks."""
    batch_size: int = 64
    """Samples in one head's batch."""
    samples: int = 8192
    """Training samples, shared by the heads."""
    lr: float = 3e-3
    """Learning rate of AdamW."""

    def build_model(self) -> nn.Module:
        return network(self.width)

    def data(self, seed: int, samples: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1234)
            teacher = network(self.width)
            torch.manual_seed(seed)
            inputs = torch.randn(samples, self.width)
            return inputs, teacher(inputs)

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.data(seed=1, samples=self.samples)
        for indices in shard.indices(self.samples, self.batch_size):
            yield inputs[indices], targets[indices]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        inputs, targets = (t.to(device) for t in self.data(seed=2, samples=1024))
        return {"validation_loss": F.mse_loss(model(inputs), targets).item()}

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=0.0)
