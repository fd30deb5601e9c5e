"""Models in 16-bit types: what trains is kept in float32, whatever formats the main weights have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.merging.flat_buffer import views


class Net(nn.Module):
    """Layers of every kind, and a weight that is used without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.conv, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.words(words))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2) * self.scale
        return F.linear(self.out(torch.tanh(x)), self.words.weight)


@dataclass
class Typed:
    """A worker whose model has this type."""

    dtype: torch.dtype

    def build_model(self) -> nn.Module:
        return Net().to(self.dtype)

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randint(16, (8, 6), generator=torch.Generator().manual_seed(slot))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch).float().flatten(0, 1), batch.roll(1, 1).flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, next(self.train_batches(Shard(0, 1, 5)))))}

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)


def settings(heads: int = 1, steps: int = 40, **lte: Any) -> Settings:
    config = LTEConfig(num_heads=heads, lora_r=4, lora_alpha=8.0, **lte)
    return Settings("zoo", config, MergeConfig(merge_iter=10, policy="average"), TrainConfig(steps=steps))


EVERYTHING = ("linear", "attention", "conv", "embedding", "norm")


@pytest.mark.parametrize("bias", ["replica", "lora"])
@pytest.mark.parametrize("adapt", [("linear", "conv"), EVERYTHING], ids=["some", "all"])
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_trains_is_float32(dtype: torch.dtype, base_dtype: str, adapt: tuple[str, ...], bias: str) -> None:
    """Factors, moments and replicas; with small steps every element moves, and the model computes in its own type."""
    run = settings(base_dtype=base_dtype, adapt=adapt, lora_bias=bias)
    head = Head(Typed(dtype), run, 0)
    head.start(0, prepare(Typed(dtype), run).base)
    before = {name: p.detach().clone() for name, p in head.trained_parameters.items()}
    head.train(40)
    for name, parameter in head.trained_parameters.items():
        assert parameter.dtype == torch.float32
        moved = (parameter.detach() != before[name]).float().mean()
        assert moved > 0.9, name  # elements whose gradient is exactly 0 in 16 bits stay
    assert {t.dtype for state in head.optimizer.state.values() for k, t in state.items() if k != "step"} == {torch.float32}
    assert {p.dtype for p in head.model.parameters()} == {dtype}


@pytest.mark.parametrize("stack", ["never", "always"])
def test_heads_of_one_process_train_16_bit_models(stack: str) -> None:
    """In turns and as one batch they learn alike, and what is merged is float32."""
    done = run_in_process(Typed(torch.bfloat16), settings(2), heads_per_actor=2, stack_heads=stack)
    start = prepare(Typed(torch.bfloat16), settings(2)).base
    assert done.base.dtype == torch.float32
    for name, value in views(done.plan.base, done.base).items():
        assert not torch.equal(value, views(done.plan.base, start)[name]), name
        assert not torch.equal(value, value.bfloat16().float()), "it has more digits than the model's type"


def test_a_write_to_a_16_bit_replica_counts() -> None:
    """What the loss writes to a parameter without factors is what trains on."""

    class Clipped(Typed):
        def loss(self, model: Any, batch: Tensor) -> Tensor:
            with torch.no_grad():
                model.scale.clamp_(max=0.5)
            return super().loss(model, batch)

    run = settings()
    head = Head(Clipped(torch.bfloat16), run, 0)
    head.start(0, prepare(Clipped(torch.bfloat16), run).base)
    head.train(3)
    assert float(head.trained_parameters["scale"].detach().max()) < 0.51
