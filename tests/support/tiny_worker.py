"""A tiny worker with every kind of parameter, and settings of a small run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.settings import Settings
from lte_ray.optim import LoRAMuon

WORDS, WIDTH, SAMPLES, BATCH = 7, 6, 96, 4


class Net(nn.Module):
    """Linear layers with and without bias, two that share a weight, an embedding tied to the output, a lone parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 8)
        self.norm = nn.LayerNorm(8)
        self.mid, self.twin = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.twin.weight = self.mid.weight
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(8, WIDTH)
        self.logits = nn.Linear(WIDTH, WORDS, bias=False)
        self.logits.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embed(words) * self.scale)))
        x = self.twin(torch.tanh(self.mid(self.dropout(x))))
        return self.logits(self.down(torch.tanh(x)))


ADAPTED = ["up.weight", "mid.weight", "down.weight"]


REPLICAS = ["scale", "embed.weight", "up.bias", "norm.weight", "norm.bias", "twin.bias", "down.bias"]


@dataclass
class Tiny:
    """Learns a fixed table of next words, in float64."""

    dropout: float = 0.0
    optimizer: str = "sgd"

    def build_model(self) -> nn.Module:
        return Net(self.dropout).double()

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        words = torch.arange(SAMPLES) * 5 % WORDS
        for indices in shard.indices(SAMPLES, BATCH):
            yield words[indices], (words[indices] * 3 + 1) % WORDS

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, following = batch
        return F.cross_entropy(model(words), following)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        words = torch.arange(WORDS)
        return {"loss": float(F.cross_entropy(model(words), (words * 3 + 1) % WORDS))}

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, lr=0.01, momentum=0.9)  # higher rates make rounding errors grow
        if self.optimizer == "lora-muon":
            return LoRAMuon(params, lr=0.01, replica_lr=0.01)
        return torch.optim.AdamW(params, lr=0.01)


@dataclass
class NaNLosses(Tiny):
    """The loss of a head's `bad_batches`, counted from 0, is NaN; by default of all its batches."""

    head: int = 1
    bad_batches: tuple[int, ...] | None = None

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, ...]]:
        for number, batch in enumerate(super().train_batches(shard), shard.cursor):
            poison = shard.head == self.head and (self.bad_batches is None or number in self.bad_batches)
            yield (*batch, torch.tensor(float("nan") if poison else 1.0))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return super().loss(model, batch[:2]) * batch[2]


def make_settings(
    *,
    heads: int = 2,
    steps: int = 12,
    merge_iter: int = 3,
    reset: str = "none",
    policy: object = "average",
    exclude: tuple[str, ...] = (),
    seed: int = 3,
) -> Settings:
    """Returns settings of a small run: rank 2, s = 2."""
    lte = LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0, reset=reset, exclude=exclude)  # type: ignore[arg-type]
    return Settings("test", lte, MergeConfig(merge_iter, policy=policy), TrainConfig(steps=steps, seed=seed))
