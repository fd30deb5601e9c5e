"""Activation checkpointing changes no result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lte_ray.config import TrainConfig
from lte_ray.engine.head.optimization import checkpoint_activations
from lte_ray.engine.head.virtual import Unstackable
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from tests.support.tiny_worker import Tiny, make_settings


def settings(*patterns: str) -> Settings:
    return dataclasses.replace(make_settings(), train=TrainConfig(steps=6, seed=3, checkpoint_activations=patterns))


def test_a_run_is_bitwise_the_same() -> None:
    """Dropout too, which draws the same numbers when activations are recomputed."""
    worker = Tiny(dropout=0.3)
    again = run_in_process(worker, settings("up", "mid", "dropout"), torch.float64)
    assert torch.equal(again.base, run_in_process(worker, settings(), torch.float64).base)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_count_a_batch_once(momentum: float | None) -> None:
    """Running mean, variance and count equal those of a model without checkpointing, also as cumulative averages."""
    models = []
    for patterns in ((), ("0",)):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh())
        model = nn.Sequential(block, nn.Linear(4, 1)).double()
        checkpoint_activations(model, patterns)
        for step in range(3):
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
        models.append(model)
    plain, again = models
    assert all(torch.equal(again.get_buffer(name), buffer) for name, buffer in plain.named_buffers())
    assert all(torch.equal(again.get_parameter(name).grad, p.grad) for name, p in plain.named_parameters())
    assert (again[0][1].momentum, again[0][1].num_batches_tracked) == (momentum, 3)


def test_a_pattern_that_names_no_module_is_refused() -> None:
    """The error lists the modules of the model."""
    with pytest.raises(ConfigError, match=r"--checkpoint-activations 'midd' matches no module.*Did you mean mid"):
        run_in_process(Tiny(), settings("midd"), torch.float64)


class OwnCheckpoints(Tiny):
    """Recomputes its activations itself, as models do after `gradient_checkpointing_enable()`."""

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        words, following = batch
        return F.cross_entropy(checkpoint(model, words, use_reentrant=False), following)


def test_stacked_heads_reject_recomputed_activations() -> None:
    """Stacked heads reject the setting at once, and a model that recomputes by itself when it fails; each says why."""
    with pytest.raises(Unstackable, match="--checkpoint-activations and --stack-heads always don't go together"):
        run_in_process(Tiny(), settings("mid"), torch.float64, heads_per_actor=2, stack_heads="always")
    with pytest.raises(Unstackable, match="can't be computed as one batch"):
        run_in_process(OwnCheckpoints(), settings(), torch.float64, heads_per_actor=2, stack_heads="always")
