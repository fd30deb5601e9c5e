"""Replacements in a model (attention, patch convolutions, norms) against the originals: outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lte_ray.errors import ConfigError
from lte_ray.misc import (
    LinearProjection,
    MultiheadAttention,
    disable_norm_affine_parameters,
    replace_conv_proj_with_linear,
    use_custom_attention,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of at most a few dozen terms of order 1, in another order


class AttentionSubclass(nn.MultiheadAttention):
    """A subclass, whose forward could compute anything."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = self.first
        self.many = nn.ModuleList([nn.MultiheadAttention(8, 4, batch_first=True), AttentionSubclass(8, 2, batch_first=True)])
        self.named = nn.ModuleDict({"wide": nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True)})

    def forward(self, x: Tensor) -> Tensor:
        for attention in (self.first, self.again, *self.many, self.named["wide"]):
            x = x + attention(x, x, x)[0]
        return x


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("split", [False, True])
def test_every_attention_is_replaced_once(split: bool) -> None:
    """Shared modules stay shared, subclasses stay, the model is the same object, and outputs and gradients stay the same."""
    torch.manual_seed(0)
    model = Block().double()
    original, x = copy.deepcopy(model), draw(2, 3, 8)
    assert use_custom_attention(model, split_qkv=split) is model
    assert type(model.first) is MultiheadAttention
    assert model.first is model.again
    assert [type(m) for m in model.many] == [MultiheadAttention, AttentionSubclass]
    assert (model.named["wide"].in_proj is None) == split
    assert_close(model(x), original(x), **TIGHT)
    (expected,), (actual,) = (torch.autograd.grad(m(x).sin().sum(), [x]) for m in (original, model))
    assert_close(actual, expected, **TIGHT)


def test_optimizers_keep_their_parameters() -> None:
    """Without split_qkv, the model's parameters are the same objects."""
    model = Block()
    before = {id(p) for p in model.parameters()}
    use_custom_attention(model)
    assert {id(p) for p in model.parameters()} == before


def test_a_lone_attention_is_replaced() -> None:
    """The new module is returned, because no parent can hold it."""
    attention = nn.MultiheadAttention(8, 2)
    new = use_custom_attention(attention)
    assert isinstance(new, MultiheadAttention)
    assert new.in_proj.weight is attention.in_proj_weight


def test_replacing_twice_changes_nothing() -> None:
    """A replaced module isn't replaced again."""
    model = use_custom_attention(Block())
    first = model.first
    assert use_custom_attention(model).first is first


def assert_projection_equals(conv: nn.Conv2d, x: Tensor) -> None:
    """Asserts that outputs and gradients of input, weight, and bias are those of the convolution."""
    linear = replace_conv_proj_with_linear(copy.deepcopy(conv))
    assert isinstance(linear, LinearProjection)
    results = []
    for module in (conv, linear):
        y = module(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual.reshape(expected.shape), expected, **TIGHT)


@given(data=st.data())
def test_a_patch_convolution_equals_its_linear_layer(data: st.DataObject) -> None:
    """Any channels, patch shapes, biases, and image sizes, also ones that don't fill the last patch; with and without N."""
    channels, out, p, q = (data.draw(st.integers(1, 4), name) for name in ("channels", "out", "p", "q"))
    height, width = data.draw(st.integers(p, 11), "height"), data.draw(st.integers(q, 11), "width")
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, (p, q), (p, q), bias=data.draw(st.booleans(), "bias")).double()
    batch = data.draw(st.sampled_from([(), (1,), (3,)]), "batch")
    assert_projection_equals(conv, draw(*batch, channels, height, width))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 2, "stride": 2, "padding": "valid"},
        {"kernel_size": 2, "stride": 2, "padding_mode": "reflect"},
        {"kernel_size": 1},
        {"kernel_size": 1, "padding": "same"},
    ],
)
def test_what_counts_as_a_projection(settings: dict[str, Any]) -> None:
    """Padding given by name, a padding mode without padding, and 1 x 1 convolutions."""
    assert_projection_equals(nn.Conv2d(3, 2, **settings).double(), draw(2, 3, 5, 4))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 2, 3, 2),
        nn.Conv2d(2, 2, 2, 2, padding=1),
        nn.Conv2d(2, 2, 2, 2, dilation=2),
        nn.Conv2d(2, 2, 2, 2, groups=2),
        nn.Conv2d(2, 2, (2, 1), (1, 2)),
        nn.Conv1d(2, 2, 2, 2),
        nn.ConvTranspose2d(2, 2, 2, 2),
        nn.LazyConv2d(2, 2, 2),
    ],
)
def test_other_convolutions_are_left_alone(conv: nn.Module) -> None:
    """Overlapping, padded, dilated, grouped, one-dimensional, transposed, and lazy ones."""
    model = nn.Sequential(conv)
    assert replace_conv_proj_with_linear(model)[0] is conv


def test_shared_and_tied_convolutions_keep_their_ties() -> None:
    """A convolution at two places stays shared; two that share a weight stay as they are."""
    conv, tied, other = nn.Conv2d(1, 1, 2, 2), nn.Conv2d(1, 1, 2, 2), nn.Conv2d(1, 1, 2, 2)
    other.weight = tied.weight
    model = replace_conv_proj_with_linear(nn.Sequential(conv, conv, tied, other))
    assert isinstance(model[0], LinearProjection)
    assert model[0] is model[1]
    assert list(model[2:]) == [tied, other]


def test_a_projection_keeps_the_convolutions_state() -> None:
    """Training mode, frozen weight, bias object, and the weight under its old name and shape."""
    conv = nn.Conv2d(3, 4, (2, 3), (2, 3)).eval()
    conv.weight.requires_grad_(False)
    weight = conv.weight.clone()
    layer = replace_conv_proj_with_linear(conv)
    assert type(layer.linear_proj) is nn.Linear
    assert not layer.linear_proj.training
    assert not layer.linear_proj.weight.requires_grad
    assert layer.linear_proj.bias is conv.bias
    assert torch.equal(layer.weight, weight)


def test_a_wrong_image_is_one_clear_error() -> None:
    """Wrong channels or dimensions, or smaller than one patch."""
    layer = replace_conv_proj_with_linear(nn.Conv2d(3, 4, 4, 4))
    for shape in ((1, 2, 8, 8), (1, 3, 3, 8), (8, 8)):
        with pytest.raises(ConfigError, match=r"\(batch, 3, height, width\) is expected"):
            layer(torch.zeros(shape))


NORMS = [
    (nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    (nn.LayerNorm((3, 6), bias=False), nn.LayerNorm((3, 6), elementwise_affine=False), (4, 3, 6)),
    (nn.RMSNorm(6), nn.RMSNorm(6, elementwise_affine=False), (4, 6)),
    (nn.GroupNorm(2, 6), nn.GroupNorm(2, 6, affine=False), (4, 6, 3)),
    (nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), (4, 6)),
    (nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), (4, 6, 2, 2)),
    (nn.BatchNorm3d(6), nn.BatchNorm3d(6, affine=False), (4, 6, 2, 2, 2)),
    (nn.InstanceNorm1d(6, affine=True), nn.InstanceNorm1d(6), (4, 6, 3)),
    (nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(6), (4, 6, 2, 2)),
    (nn.InstanceNorm3d(6, affine=True), nn.InstanceNorm3d(6), (4, 6, 2, 2, 2)),
]


@pytest.mark.parametrize(("norm", "plain", "shape"), NORMS, ids=[type(n[0]).__name__ for n in NORMS])
@pytest.mark.parametrize("train", [True, False])
def test_norms_without_affine_parameters(norm: nn.Module, plain: nn.Module, shape: tuple[int, ...], train: bool) -> None:
    """No parameter is left, flags and state show it, and outputs are bitwise those of a norm made without parameters."""
    norm, plain = copy.deepcopy(norm).double(), copy.deepcopy(plain).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(norm).train(train)
    assert disable_norm_affine_parameters(model) is model
    assert list(norm.parameters()) == []
    assert norm.state_dict().keys() == plain.state_dict().keys()
    assert norm.weight is None
    assert getattr(norm, "bias", None) is None
    assert not getattr(norm, "affine", False)
    assert not getattr(norm, "elementwise_affine", False)
    x = draw(*shape)
    assert torch.equal(model(x), plain.train(train)(x))


def test_torchs_encoder_runs_without_affine_parameters() -> None:
    """Also in eval mode, where the fast path would read the norms' weights: both modes give the same."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = disable_norm_affine_parameters(nn.TransformerEncoder(layer, 2))
    x, padding = draw(2, 3, 8), torch.tensor([[False] * 3, [False, True, True]])
    with torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=padding)
        assert_close(model.eval()(x, src_key_padding_mask=padding), expected, **TIGHT)
        assert_close(model.layers[0].eval()(x), model.layers[0].train()(x), **TIGHT)


def test_a_new_projection() -> None:
    """LinearProjection(hidden_dim, patch_size) computes what the convolution with its weight does."""
    for size, channels, bias in ((2, 3, True), ((2, 3), 1, False)):
        layer = LinearProjection(5, size, channels, bias)
        x = torch.randn(2, channels, 6, 6)
        conv = torch.nn.functional.conv2d(x, layer.weight, layer.linear_proj.bias, stride=size)
        assert layer.patch_size == size
        assert_close(layer(x), conv)
    assert LinearProjection(hidden_dim=4, patch_size=2).linear_proj.weight.shape == (4, 12)
    with pytest.raises(ConfigError, match="patch_size = 0"):
        LinearProjection(4, 0)
