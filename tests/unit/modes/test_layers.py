"""Layers of the in-process modes: what they compute, what trains, and what a merge does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lte_ray
from lte_ray import LTEConfig, LTELayer, prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import (
    HEADS,
    LAYERS,
    MODES,
    SEED,
    UNIFORM,
    factors,
    loss,
    one_linear,
    perturb,
    prepare,
)
from tests.support.numerics import assert_near


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(LAYERS))
def test_outputs_are_unchanged_at_first(kind: str, mode: str) -> None:
    """B = 0: the model computes what it did, in training (batch norm: on each head's part) and in evaluation."""
    case = LAYERS[kind]
    x, _ = case.batch(0)
    original, model = case.build(), prepare(case, mode)
    parts = [x] if mode == "mhlora" else x.chunk(HEADS)
    assert_near(model(x), torch.cat([original(part) for part in parts]), 1e-14)
    assert_near(prepare(case, mode).eval()(x), case.build().eval()(x), 1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(LAYERS))
def test_evaluation_uses_the_merged_weights_alone(kind: str, mode: str) -> None:
    """It equals the unconverted model with `merged_state_dict`; in ddp and dmp only merges change it."""
    case = LAYERS[kind]
    x, _ = case.batch(0)
    model = prepare(case, mode).eval()
    before = model(x)
    perturb(model)
    if mode != "mhlora":
        assert torch.equal(model(x), before)
        MergeCondition(model).merge()
    assert not torch.allclose(model(x), before)
    original = case.build().eval()
    original.load_state_dict(merged_state_dict(model))
    assert_near(model(x), original(x), 1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_layers_stay_what_they_were(mode: str) -> None:
    """The same objects, which are LTELayer and nn.Linear at once; only factors and the heads' biases train."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    weight = layer.weight
    model = prepare_model_for_lte(nn.Sequential(layer), UNIFORM, mode=mode)
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer, LTELayer)
    assert isinstance(layer, nn.Linear)
    assert (layer.num_heads, layer.lora_r, layer.lora_alpha, layer.scaling, float(layer.merged)) == (2, 2, 4.0, 2.0, 0.0)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained - {name for name in trained if "lora_" in name} == {"bias" if mode == "mhlora" else "bias_replicas"}
    assert "heads=2, rank=2, s=2.0" in repr(layer)


def test_the_authors_attributes() -> None:
    """ddp has stacked factors and references; dmp has lists of layers and factors with the same values."""
    ddp, dmp = one_linear("ddp")[0], one_linear("dmp")[0]
    assert ddp.lora_A_weight.shape == ddp.prev_lora_A_weight.shape == (HEADS, 2, 5)
    assert ddp.lora_B_weight.shape == ddp.prev_lora_B_weight.shape == (HEADS, 4, 2)
    assert [m.weight.shape for m in dmp.layers] == [(4, 5)] * HEADS
    assert [m.weight.shape for m in dmp.lora_A] == [(2, 5)] * HEADS
    assert [m.weight.shape for m in dmp.lora_B] == [(4, 2)] * HEADS
    assert all(torch.equal(one.weight, a) for one, a in zip(dmp.lora_A, ddp.lora_A_weight, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "attention", "batch-norm"])
def test_gradients_reach_everything_that_trains_and_nothing_else(kind: str, mode: str) -> None:
    """After one backward pass with B != 0."""
    case = LAYERS[kind]
    model = perturb(prepare(case, mode))
    x, target = case.batch(0)
    loss(model(x), target).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_ranks_that_differ_by_head_are_padded_and_stay_so() -> None:
    """The padding is zero, gets no gradient, and is still zero after training with weight decay and merges."""
    model = one_linear("ddp", lte=LTEConfig(num_heads=2, lora_r=(1, 3), lora_alpha=(1.0, 6.0)))
    layer, optimizer = model[0], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert not layer.lora_A_weight.grad[0, 1:].any()
        assert not layer.lora_B_weight.grad[0, :, 1:].any()
        optimizer.step()
        layer.merge_parameters()
    assert layer.scaling == (1.0, 2.0)
    assert not layer.lora_A_weight[0, 1:].any()
    assert not layer.lora_B_weight[0, :, 1:].any()
    assert layer.lora_B_weight[1].all()


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize("reset", ["none", "B"])
def test_a_merge_resets_what_the_config_says(mode: str, reset: str) -> None:
    """A head computes with the merged W right after a merge: with "B", B is zero and A is kept; without resets, both stay."""
    model = one_linear(mode, lte=LTEConfig(num_heads=2, lora_r=2, lora_alpha=4.0, reset=reset, lora_bias="frozen"))
    perturb(model)
    layer = model[0]
    before = [p.detach().clone() for p in factors(model)]
    start, x = layer.weight.clone(), torch.randn(4, 5, dtype=torch.float64)
    layer.merge_parameters()
    assert not torch.equal(layer.weight, start)
    assert_near(model(x), model.eval()(x), 1e-14)
    # 1e-14: W + s B A - s B A, in float64.
    assert_near(model.train()(x), model.eval()(x), 1e-14)
    for (name, p), old in zip(((n, p) for n, p in model.named_parameters() if "lora_" in n), before, strict=True):
        assert torch.equal(p, torch.zeros_like(old) if reset == "B" and "lora_B" in name else old)
    merged = layer.weight.clone()
    layer.merge_parameters()
    assert_near(layer.weight, merged, 1e-15)


def test_shared_weights_are_merged_once_and_drawn_alike() -> None:
    """A second merge changes no bit; resets of both layers draw the same A in ddp and in dmp."""
    draws = []
    for mode in ("ddp", "dmp"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).double()
        model[2].weight = model[0].weight
        lte = LTEConfig(num_heads=3, lora_r=4, lora_alpha=10.0)
        perturb(prepare_model_for_lte(model, lte, mode=mode, seed=SEED))
        model[0].merge_parameters()
        weight = model[0].weight.clone()
        model[2].merge_parameters()
        assert torch.equal(model[0].weight, weight)
        for layer in (model[0], model[2]):
            layer.reset_lora_parameters()
        layer = model[0]
        draws.append([layer.lora_A_weight[h] if mode == "ddp" else layer.lora_A[h].weight for h in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


@pytest.mark.parametrize("ranks", [(3, 5), 3])
def test_scalings_that_are_not_exact_in_binary(ranks: tuple[int, ...] | int) -> None:
    """16/3 and 16/5 are exact to float64 if a float32 model becomes float64, and to float32 if it becomes bfloat16."""
    lte = LTEConfig(num_heads=2, lora_r=ranks, lora_alpha=16.0, adapt=("linear", "conv"), lora_bias="lora")
    outputs = []
    for mode in ("ddp", "dmp"):
        torch.manual_seed(0)
        original = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Linear(8, 8))
        model = prepare_model_for_lte(original, lte, mode=mode, seed=SEED).double()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for layer in model:
                noise = torch.randn(2, layer.specs[0].matrix[0], 5, generator=generator).double()
                for head, spec in enumerate(layer.specs):
                    b = layer.lora_B_weight[head, :, : spec.rank] if mode == "ddp" else layer.lora_B[head].weight
                    b.copy_(noise[head, :, : spec.rank])
                    layer.lora_bias.lora_B_weight[head] = noise[head, :, :1]
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).double()
        outputs.append(model(x))
    # 1e-13: float64; a float32 scaling is off by 1e-8.
    assert_near(outputs[0], outputs[1], 1e-13)
    half = copy.deepcopy(model).to(torch.bfloat16)
    scales = half[0].lora_bias.scales
    assert torch.equal(scales, torch.tensor([s.scaling for s in half[0].specs]))
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_a_bfloat16_convolution_is_scaled_exactly(mode: str) -> None:
    """255 (1 + 1/256) is 256 in bfloat16, although the scaling alone would round to 1."""
    lte = LTEConfig(num_heads=2, lora_r=1, lora_alpha=1 + 2**-8, lora_bias="frozen")
    model = prepare_model_for_lte(nn.Sequential(nn.Conv1d(1, 1, 1)), lte, mode=mode).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(float("lora_" in name))
    assert model(torch.full((2, 1, 1), 255.0, dtype=torch.bfloat16)).flatten().tolist() == [256.0, 256.0]


def test_inputs_that_cannot_be_split() -> None:
    """The error is a ValueError and an LTEError that names batch, heads, and what to change; mhlora splits nothing."""
    x = torch.randn(3, 5, dtype=torch.float64)
    for mode in ("ddp", "dmp"):
        model = one_linear(mode)
        with pytest.raises(ValueError, match=r"batch of 3 can't be split over 2 heads.* a batch of 2 or 4") as caught:
            model(x)
        assert isinstance(caught.value, lte_ray.LTEError)
        with pytest.raises(ValueError, match="no batch dimension"):
            model(x[0])
        assert model.eval()(x[0]).shape == (4,)
    assert one_linear("mhlora")(x[0]).shape == (4,)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_rounds_nothing_in_merges(mode: str) -> None:
    """Merges and `merged_state_dict` under autocast give the same bits as without."""
    model = perturb(prepare(LAYERS["attention"], mode)).float()
    expected = copy.deepcopy(model)
    MergeCondition(expected).merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MergeCondition(model).merge()
        state = merged_state_dict(model)
    assert all(torch.equal(value, state[name]) for name, value in merged_state_dict(expected).items())
    assert all(torch.equal(a, b) for a, b in zip(expected.state_dict().values(), model.state_dict().values(), strict=True))
