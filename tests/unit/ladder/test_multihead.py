"""Multi-head LoRA as a training: equal to LTE that merges after every step, if all heads see all batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerFailed
from lte_ray.ladder.multihead import MultiheadTraining
from lte_ray.merging.flat_buffer import views
from tests.support.tiny_worker import Tiny

HEADS = 3


class AllBatches(Tiny):
    """Every head gets every batch."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        return super().train_batches(Shard(0, 1, shard.seed, shard.cursor))


def settings(heads: int = HEADS, accumulate: int = 1, rank: int | tuple[int, ...] = 2, **more: object) -> Settings:
    lte = LTEConfig(num_heads=heads, lora_r=rank, lora_alpha=4.0, **more)  # type: ignore[arg-type]
    return Settings("test", lte, MergeConfig(1, "average"), TrainConfig(steps=6, seed=3, accumulate=accumulate))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lora-muon"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rank": (1, 2, 4)},
        {"lora_bias": "lora", "adapt": ("linear", "norm", "embedding")},
        {"layers": ("mid: lr=0.5 lora_alpha=2", "down: adapt=false lr=0.25"), "lora_bias": "frozen"},
    ],
    ids=["linear", "ranks", "vectors", "rules"],
)
def test_it_equals_lte_that_merges_every_step_with_the_same_batches(optimizer: str, more: dict) -> None:
    """Weights agree after six steps of three batches, whether the optimizer sees the gradients' scale, and each head's s."""
    worker = AllBatches(optimizer=optimizer)
    run = run_in_process(worker, settings(accumulate=HEADS, **more), torch.float64)
    training = MultiheadTraining(worker, settings(**more))
    for _ in range(6):
        training.train_step()
    assert (training.step, training.samples) == (6, 6 * HEADS * 4)
    weights = training.merged_weights()
    for name, expected in views(run.plan.base, run.base).items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-9)
    change = run.base - prepare(worker, settings(**more), torch.float64).base
    assert change.norm() > 1e-3


class Pictures:
    """Layers of other kinds, and a loss that reads a layer's weight without calling it."""

    def build_model(self) -> nn.Module:
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        return nn.ModuleDict(
            {"conv": nn.Conv2d(1, 8, 3), "norm": nn.BatchNorm2d(8), "attention": attention, "top": nn.Linear(8, 4)}
        )

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in shard.indices(32, 4):
            x = torch.from_numpy(indices).float()[:, None, None, None] / 32 + torch.linspace(0, 1, 25).view(1, 1, 5, 5)
            yield x, torch.from_numpy(indices) % 4

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        tokens = model["norm"](model["conv"](x)).flatten(2).mT  # type: ignore[index]
        attended = model["attention"](tokens, tokens, tokens)[0].mean(1)  # type: ignore[index]
        return F.cross_entropy(F.linear(attended, model["top"].weight), labels)  # type: ignore[index]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.loss(model, next(self.train_batches(Shard(0, 1, 5)))).item()}

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02)


def test_all_kinds_of_layers_train_and_are_evaluated() -> None:
    """Weights of a convolution, attention, and a layer that isn't called all change; the merged model computes the same."""
    training = MultiheadTraining(Pictures(), dataclasses.replace(settings(2), train=TrainConfig(steps=9)))
    start = training.merged_weights()
    losses = [training.train_step() for _ in range(9)]
    assert losses[-1] < losses[0]
    merged = Pictures().build_model()
    merged.load_state_dict(training.merged_weights())
    assert training.evaluate()["loss"] == pytest.approx(Pictures().evaluate(merged.eval())["loss"], rel=1e-6)
    for name, tensor in training.merged_weights().items():
        if name not in ("attention.in_proj_bias", "top.bias"):  # the key's bias has no gradient, and top isn't called
            assert not torch.equal(tensor, start[name]), name


def test_an_error_of_the_worker_names_the_step() -> None:
    """WorkerFailed with the traceback, from the step that raised."""

    class Fails(Tiny):
        def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            yield from [next(super().train_batches(shard))] * HEADS
            raise OSError("the disk is gone")

    training = MultiheadTraining(Fails(), settings())
    training.train_step()
    with pytest.raises(WorkerFailed, match=r"(?s)mhlora at local step 2.*the disk is gone"):
        training.train_step()
