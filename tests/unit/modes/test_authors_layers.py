"""Methods and checkpoints of the authors' layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_ray as lte
from tests.support.numerics import assert_near

HEADS = 4


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_the_authors_methods_of_layers(mode: str) -> None:
    """get_lora_params, compute_delta, and lora_to_delta are stacked by head; a merge adds the mean of compute_delta."""
    cfg = lte.LTEConfig.default(lora_r=(2, 3), lora_alpha=(4, 3), num_heads=2, lora_bias=True)
    layer = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)), cfg, mode=mode)[0].double()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    if mode == "ddp":  # beyond a head's rank
        layer.lora_A_weight.data[0, 2:], layer.lora_B_weight.data[0, :, 2:] = 0, 0
    (a, b), biases = layer.get_lora_params()
    assert (a.shape, b.shape, biases) == ((2, 3, 5), (2, 4, 3), (None, None))
    weight, bias = layer.compute_delta()
    assert (weight.shape, bias.shape) == ((2, 4, 5), (2, 4))
    assert_near(weight, torch.stack([2 * b[0] @ a[0], b[1] @ a[1]]), 1e-14)
    before = [layer.main_weight.clone(), layer._parameters["bias"].clone()]
    layer.merge_parameters()
    assert_near(layer.main_weight, before[0] + weight.mean(0), 1e-14)
    assert_near(layer._parameters["bias"], before[1] + bias.mean(0), 1e-14)
    b_a, b_b = torch.randn(2, 3).double(), torch.randn(2, 4).double()
    deltas = layer.lora_to_delta(a, b, b_a, b_b, 0.5)
    assert_near(deltas[0][1], 0.5 * b[1] @ a[1], 1e-14)
    assert_near(deltas[1][1], 0.5 * (b[1] @ b_a[1] + b_b[1]), 1e-14)


def test_the_authors_lists_of_mhlora_factors() -> None:
    """lora_A[h].weight reads and sets the head's part of the stacked factors, and has its gradient."""
    layer = lte.prepare_model_for_lte(
        nn.Sequential(nn.Linear(5, 4)), lte.LTEConfig.default(lora_r=(2, 3), num_heads=2), mode="mhlora"
    )[0]
    layer.lora_B[1].weight.data = torch.ones(4, 3)
    layer.lora_A[0].weight.data.fill_(2.0)
    layer(torch.ones(2, 5)).sum().backward()
    assert [f.weight.shape for f in layer.lora_A] == [(2, 5), (3, 5)]
    assert layer.lora_B_weight[1].eq(1).all()
    assert layer.lora_A_weight[0, :2].eq(2).all()
    assert not layer.lora_A_weight[0, 2:].any()
    assert torch.equal(layer.lora_A[1].weight.grad, layer.lora_A_weight.grad[1])
    assert torch.equal(layer.lora_B[0].weight.grad, layer.lora_B_weight.grad[0, :, :2])


def authors_state(mode: str, merged: bool, rank: int, shape: tuple[int, int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The state dict of one of the authors' layers (s = 2), and each head's dense weight."""
    out, width = shape
    generator = torch.Generator().manual_seed(0)
    w, bias, *factors = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, (out,), *[(HEADS, rank, width), (HEADS, out, rank)] * 2)
    )
    a, b, prev_a, prev_b = (f if merged or i < 2 else torch.zeros_like(f) for i, f in enumerate(factors))
    state = {"weight": w, "bias": bias, "merged": torch.full((1,), float(merged)), "lora_initialized": torch.ones(1)}
    merged_changes = 2 * prev_b @ prev_a
    if mode == "ddp":
        state |= {"lora_A_weight": a, "lora_B_weight": b, "prev_lora_A_weight": prev_a, "prev_lora_B_weight": prev_b}
        state |= {"lora_A.weight": a[0], "lora_B.weight": b[0]}
    else:
        for h in range(HEADS):
            state |= {f"lora_A.{h}.weight": a[h], f"lora_B.{h}.weight": b[h]}
            state |= {f"layers.{h}.weight": w - merged_changes[h], f"layers.{h}.bias": bias}
        if merged:
            state["prev_delta_weights"] = merged_changes
    return state, list(w + 2 * b @ a - merged_changes)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5)])
@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_the_authors_checkpoints_are_loaded(mode: str, shape: tuple[int, int], merged: bool) -> None:
    """Every head computes what it did there, before and after a merge, also if the rank is cut to min(out, in)."""
    state, dense = authors_state(mode, merged, 4, shape)
    cfg = lte.LTEConfig.default(lora_r=4, lora_alpha=8, num_heads=HEADS)
    model = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(shape[1], shape[0])), cfg, mode=mode).double()
    model.load_state_dict({f"0.{name}": value for name, value in state.items()})
    x = torch.randn(HEADS, shape[1], dtype=torch.float64)
    for part, weight, y in zip(x, dense, model(x), strict=True):
        assert_near(y, weight @ part + state["bias"], 1e-12)
    assert_near(model.eval()(x), F.linear(x, state["weight"], state["bias"]), 1e-12)
    model[0].merge_parameters()
    after = state["weight"] + torch.stack(dense).mean(0) - state["weight"]
    assert_near(model(x), F.linear(x, after, state["bias"]), 1e-12)
    state_here = model.state_dict()
    model.load_state_dict(state_here)
    assert all(torch.equal(value, state_here[name]) for name, value in model.state_dict().items())
    cfg.lora.reset = "B"
    model = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(shape[1], shape[0])), cfg, mode=mode)
    with pytest.raises(lte.LTEError, match="reset='none'"):
        model.load_state_dict({f"0.{name}": value for name, value in state.items()})


def test_the_authors_checkpoints_of_replicas_are_loaded() -> None:
    """They hold only copies; the merged module gets the mean."""
    layer = lte.MultiheadReplicaLayer(nn.Sequential(nn.Linear(3, 2)), HEADS)
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items() if name.startswith("replicas.")}
    layer.load_state_dict(state)
    assert torch.equal(layer.replicas[1][0].weight, state["replicas.1.0.weight"])
    mean = torch.stack([state[f"replicas.{h}.0.weight"] for h in range(HEADS)]).mean(0)
    assert_near(layer.main[0].weight, mean, 1e-6)  # float32
    with pytest.raises(RuntimeError, match=r"Missing key.*main.0.weight"):
        layer.load_state_dict({name: value for name, value in state.items() if "replicas.1" not in name})
