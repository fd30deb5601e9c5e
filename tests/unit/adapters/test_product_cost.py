"""Layers that form W~ + s B A where that is cheaper give what layers give that keep the product apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lte_ray.adapters.factors import Factors
from lte_ray.adapters.layer import add_factors
from lte_ray.adapters.product_cost import forms_weight
from lte_ray.adapters.user_parameter import UserParameter, UserParameters
from lte_ray.layout import Adapted
from tests.support.numerics import assert_near

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (64, 24)),
    "linear, no bias": (lambda: nn.Linear(24, 16, bias=False), (4, 32, 24)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (8, 6, 12, 12)),
    "conv, groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (8, 6, 12, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, padding=2, padding_mode="circular"), (8, 6, 40)),
}


def make(name: str, rank: int) -> tuple[nn.Module, UserParameter, Tensor]:
    """A layer with random factors, and an input."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    spec = Adapted("w", tuple(weight.shape), rank, 0.5)
    user = UserParameter(spec, weight, Factors(spec, weight))
    nn.init.normal_(user.factors.A)
    nn.init.normal_(user.factors.B)
    return add_factors(layer, {"weight": user}, UserParameters()), user, torch.randn(*shape, dtype=torch.float64)


def compute(name: str, *, formed: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Output, and gradients of input, factors and bias."""
    monkeypatch.setattr("lte_ray.adapters.layer.forms_weight", lambda *arguments: formed)
    layer, user, x = make(name, 4)
    y = layer(x.requires_grad_())
    torch.sin(y).sum().backward()
    assert layer.weight.grad is None
    return [y.detach(), x.grad, user.factors.A.grad, user.factors.B.grad, getattr(layer.bias, "grad", None)]


@pytest.mark.parametrize("name", LAYERS)
def test_both_ways_give_the_same_output_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding in float64: sums of some hundred terms."""
    apart, formed = (compute(name, formed=formed, monkeypatch=monkeypatch) for formed in (False, True))
    for one, other in zip(apart, formed, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_near(one, other, 1e-11)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("name", ["linear", "linear, no bias"])
def test_the_choice_is_the_one_with_fewer_operations(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts those of a forward and a backward pass."""
    counts = {}
    for formed in (False, True):
        monkeypatch.setattr("lte_ray.adapters.layer.forms_weight", lambda *arguments, formed=formed: formed)
        layer, _, x = make(name, rank)
        with FlopCounterMode(display=False) as counter:
            layer(x.requires_grad_()).sum().backward()
        counts[formed] = counter.get_total_flops()
    layer, user, x = make(name, rank)
    assert isinstance(user.stored, Tensor)
    assert forms_weight(layer, user.spec, x, user.stored, rank) == (counts[True] < counts[False])


def test_convolutions_count_the_positions_of_their_output() -> None:
    """With a stride of 16 in both directions there are 4 of them, too few to form the weight."""
    x = torch.zeros(1, 8, 32, 32)
    chosen = [
        forms_weight(conv, Adapted("w", tuple(conv.weight.shape), 8, 1.0), x, conv.weight, 8)
        for conv in (nn.Conv2d(8, 8, 3, stride=1), nn.Conv2d(8, 8, 3, stride=16))
    ]
    assert chosen == [True, False]


def test_rounding_formats_keep_the_product_apart() -> None:
    """W~ + s B A in 16 bits would lose small products."""
    layer, user, x = make("linear", 16)
    assert isinstance(user.stored, Tensor)
    assert forms_weight(layer, user.spec, x, user.stored, 16)
    assert not forms_weight(layer, user.spec, x, user.stored.bfloat16(), 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not forms_weight(layer, user.spec, x, user.stored, 16)
