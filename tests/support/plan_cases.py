"""Small models for tests of plans, and what a plan decides about them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters import Converted
from lte_ray.adapters.plan import make_plan
from lte_ray.config import LTEConfig
from lte_ray.errors import ConfigError, UserError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import as_stored

ALL_KINDS = ("linear", "attention", "conv", "embedding", "norm")


def make_config(**settings: Any) -> LTEConfig:
    return LTEConfig(**({"num_heads": 1, "lora_r": 2, "lora_alpha": 3.0} | settings))


def make_plan_for(model: nn.Module, **settings: Any) -> Plan:
    return make_plan(model, make_config(**settings))


def plan_names(model: nn.Module, **settings: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the adapted parameters and of the replicas."""
    plan = make_plan_for(model, **settings)
    return [a.name for a in plan.adapted], [r.name for r in plan.replicas]


def refusal_message(model: nn.Module, kind: type[UserError] = ConfigError, **settings: Any) -> str:
    """Returns the message with which the model is refused."""
    with pytest.raises(kind) as raised:
        make_plan_for(model, **settings)
    return str(raised.value)


def make_linear(**options: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4, **options).double()


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize_factors(converted: Converted) -> None:
    with torch.no_grad():
        for i, factor in enumerate(converted.factors.values()):
            factor.copy_(random_tensor(*factor.shape, seed=i))


def merged_model(original: nn.Module, converted: Converted) -> nn.Module:
    """Returns a copy of the unconverted model with W + s B A instead of W."""
    model = copy.deepcopy(original)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in converted.plan.adapted:
            product = converted.factors[spec.b_name] @ converted.factors[spec.a_name]
            parameters[spec.name] += as_stored(spec, spec.scaling * product)
    return model


class TiedModel(nn.Module):
    """An embedding that shares its weight with the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.words(x))))


# -- kinds -------------------------------------------------------------------------------------------------------------


def model_of_every_kind() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv2d(4, 4, 3),
            "embedding": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
        }
    )
