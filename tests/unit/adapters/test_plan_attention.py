"""Plans of attention: packed and separate projections, biases, exclusion, and the output projection."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters import convert
from tests.support.numerics import EPS64, assert_near
from tests.support.plan_cases import (
    make_config,
    merged_model,
    plan_names,
    random_tensor,
    randomize_factors,
)

# -- attention ---------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Cross attention at two places, which may be one module."""

    def __init__(self, shared: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.second = self.first if shared else nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor, values: Tensor) -> Tensor:
        x = x + self.first(x, memory, values)[0]
        return x + self.second(query=x, key=memory, value=values, need_weights=False)[0]


OPTIONS: list[dict[str, Any]] = [{}, {"kdim": 8, "vdim": 8}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_computes_with_factors_in_each_projection(options: dict[str, Any], shared: bool) -> None:
    """Packed and separate projections; outputs are those of the merged weights, gradients reach every factor and replica."""
    original = Attends(shared, **options).double()
    x, memory = random_tensor(2, 3, 8, seed=1), random_tensor(2, 4, options.get("kdim", 8), seed=2)
    values = random_tensor(2, 4, options.get("vdim", 8), seed=3)
    converted = convert(copy.deepcopy(original), make_config())
    assert (converted.model.first is converted.model.second) == shared
    each = 4 if "kdim" in options and options["kdim"] != 8 else 2
    assert len(converted.plan.adapted) == each * (1 if shared else 2)
    # Another order of the same sums.
    assert_near(converted.model(x, memory, values), original(x, memory, values), 50 * EPS64)
    randomize_factors(converted)
    found = converted.model(x, memory, values)
    assert_near(found, merged_model(original, converted)(x, memory, values), 1000 * EPS64)
    found.square().sum().backward()
    assert all(f.grad is not None for f in converted.factors.values())
    assert all(converted.parameters[r.name].grad is not None for r in converted.plan.replicas)


def test_attention_can_be_the_whole_model() -> None:
    """The converted model is another module, under the same names."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2).double()
    converted = convert(copy.deepcopy(original), make_config())
    assert [a.name for a in converted.plan.adapted] == ["in_proj_weight", "out_proj.weight"]
    assert [r.name for r in converted.plan.replicas] == ["in_proj_bias", "out_proj.bias"]
    randomize_factors(converted)
    x = random_tensor(3, 2, 8)
    assert_near(converted.model(x, x, x)[0], merged_model(original, converted)(x, x, x)[0], 1000 * EPS64)


@pytest.mark.parametrize(
    ("exclude", "adapted"),
    [
        (("first.out_proj",), ["first.in_proj_weight", "second.in_proj_weight", "second.out_proj.weight"]),
        (("first.in_proj_weight",), ["first.out_proj.weight", "second.in_proj_weight", "second.out_proj.weight"]),
        (("first",), ["second.in_proj_weight", "second.out_proj.weight"]),
        (("*.out_proj",), ["first.in_proj_weight", "second.in_proj_weight"]),
    ],
)
def test_parts_of_attention_can_be_excluded(exclude: tuple[str, ...], adapted: list[str]) -> None:
    """The rest is adapted; what is excluded trains as a replica, bias and all, and gets gradients."""
    original = Attends().double()
    converted = convert(copy.deepcopy(original), make_config(exclude=exclude))
    assert [a.name for a in converted.plan.adapted] == adapted
    randomize_factors(converted)
    x = random_tensor(2, 3, 8)
    found = converted.model(x, x, x)
    assert_near(found, merged_model(original, converted)(x, x, x), 1000 * EPS64)
    found.square().sum().backward()
    assert all(converted.parameters[r.name].grad is not None for r in converted.plan.replicas)


@pytest.mark.parametrize(("bias", "left"), [("frozen", []), ("replica", ["in_proj_bias", "out_proj.bias"])])
def test_biases_of_attention_are_frozen_too(bias: str, left: list[str]) -> None:
    """Also those that are packed though the projections aren't (kdim, vdim)."""
    for options in ({}, {"kdim": 3, "vdim": 5}):
        model = nn.MultiheadAttention(8, 2, **options)
        assert plan_names(model, lora_bias=bias)[1] == left
        assert convert(model, make_config(lora_bias=bias)).parameters["in_proj_bias"].requires_grad == (bias == "replica")


def test_packed_biases_of_separate_projections_are_replicas_where_biases_have_factors() -> None:
    """They are added after the projections, so they can't have a factor; that of out_proj has one."""
    adapted, replicas = plan_names(nn.MultiheadAttention(8, 2, kdim=3, vdim=5), lora_bias="lora")
    assert adapted[-1] == "out_proj.bias"
    assert replicas == ["in_proj_bias"]


def test_hooks_of_an_attention_see_its_calls() -> None:
    """A program that records attention maps with a forward hook still works."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    maps: list[Tensor] = []
    model["attention"].register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    model["attention"].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "average_attn_weights": False}), with_kwargs=True
    )
    x = random_tensor(2, 3, 8)
    model["attention"](x, x, x)
    convert(model, make_config())
    model["attention"](x, x, x)
    assert [m.shape for m in maps] == [(2, 2, 3, 3)] * 2
    assert_near(maps[1], maps[0], 50 * EPS64)
