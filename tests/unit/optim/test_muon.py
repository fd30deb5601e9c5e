"""Muon against its formula in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.optim import Muon


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def msign(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (8, 3, 2, 2), (4, 1)])
def test_steps_follow_the_formula(shape: tuple[int, ...], nesterov: bool) -> None:
    """Three steps with weight decay; a convolution's kernel counts as a matrix of out x rest."""
    weight = nn.Parameter(draw(*shape))
    expected, momentum = weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([{"params": [weight], "name": "weight"}], lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.5)
    ratio = math.sqrt(max(1, shape[0] / math.prod(shape[1:])))
    for seed in range(3):
        weight.grad = draw(*shape, seed=seed + 1)
        momentum = 0.8 * momentum + weight.grad
        direction = weight.grad + 0.8 * momentum if nesterov else momentum
        expected = 0.95 * expected - 0.1 * ratio * msign(direction.reshape(shape[0], -1)).reshape(shape)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-3)


def test_weights_of_several_shapes_and_types_are_independent() -> None:
    """One optimizer of all takes the steps of one optimizer each; a weight without a gradient stays."""
    together = [nn.Parameter(draw(*s, seed=n)) for n, s in enumerate([(6, 4), (6, 4), (3, 5), (6, 4)])]
    together[3] = nn.Parameter(together[3].detach().to(torch.bfloat16))
    unused = nn.Parameter(draw(6, 4))
    alone = copy.deepcopy(together)
    optimizers = [Muon([{"params": [*together, unused], "name": "weight"}])]
    optimizers += [Muon([{"params": [p], "name": "weight"}]) for p in alone]
    for p, q in zip(together, alone, strict=True):
        p.grad = q.grad = draw(*p.shape, seed=9, dtype=p.dtype)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert torch.equal(unused, draw(6, 4))


def test_other_groups_train_with_adamw() -> None:
    """Factors too: Muon is for whole weights."""
    weights = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))]
    optimizer = Muon([{"params": weights[:1], "name": "lora"}], replica_lr=3e-3)
    adamw = torch.optim.AdamW(weights[1:], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        weights[0].grad = weights[1].grad = draw(5, seed=seed, dtype=torch.float32)
        optimizer.step()
        adamw.step()
    assert torch.equal(*weights)


def test_a_closure_is_computed_with_gradients() -> None:
    """As with any of torch's optimizers; its loss is returned."""
    weight = nn.Parameter(draw(2, 2))
    optimizer = Muon([{"params": [weight], "name": "weight"}])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert optimizer.step(closure).detach() == before.square().sum()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [nn.Parameter(torch.ones(3))], "name": "weight"}], r"shape \(3,\)"),
        ([{"params": [nn.Parameter(torch.ones(3))]}], "it was given a group without a name"),
        ([nn.Parameter(torch.ones(3, 3))], "it was given parameters"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: list[Any], message: str) -> None:
    """Vectors can't be orthogonalized, and nothing says what groups without a name are."""
    with pytest.raises(ConfigError, match=message):
        Muon(groups)


def test_sparse_gradients_are_refused() -> None:
    """As by torch's AdamW."""
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = Muon([{"params": [table.weight], "name": "replica"}])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
