"""The groups that optimizers get of a model in one of the modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lte_ray import LTEConfig, prepare_model_for_lte
from lte_ray.modes import parameter_groups
from lte_ray.modes.stacked_factors import StackedFactors
from lte_ray.optim import LoRAMuon
from tests.support.mode_models import LTE, MODES, SEED, Tied

pytestmark = pytest.mark.filterwarnings("ignore:.*train without LoRA, but nothing mentions them")


@pytest.mark.parametrize("mode", MODES)
def test_groups_have_every_trained_parameter_once(mode: str) -> None:
    """Tied weights' factors once; each pair fits, and its scalings are those of the heads."""
    model = prepare_model_for_lte(Tied(), LTE, mode=mode, seed=SEED, strict=False)
    lora, replica = parameter_groups(model)
    assert {id(p) for g in (lora, replica) for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in lora["params"]}) == len(lora["params"]) == 2 * len(lora["scalings"])
    for a, b, scaling in zip(lora["params"][::2], lora["params"][1::2], lora["scalings"], strict=True):
        assert a.shape[-2] == b.shape[-1]
        assert scaling in (2.0, 3.0, [2.0, 3.0])
    if mode == "mhlora":  # ranks 2 and 1: padded, with each head's scaling
        assert [2.0, 3.0] in lora["scalings"]


@pytest.mark.parametrize("mode", MODES)
def test_lora_muon_trains_a_model_in_any_mode(mode: str) -> None:
    """Every head's factors move, and the loss falls; what is padded beyond a head's rank stays zero."""
    torch.manual_seed(0)
    model = prepare_model_for_lte(Tied(), LTE, mode=mode, seed=SEED, strict=False).train()
    optimizer, words = LoRAMuon(parameter_groups(model), lr=0.05), (torch.arange(48) % 7).view(8, 6)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(words).flatten(0, 1), (words * 3 % 7).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for factors in (m for m in model.modules() if isinstance(m, StackedFactors)):
        for head, spec in enumerate(factors.specs):
            assert factors.lora_B_weight[head, :, : spec.rank].any()
            assert not factors.lora_A_weight[head, spec.rank :].any()
            assert not factors.lora_B_weight[head, :, spec.rank :].any()


def test_stacked_heads_of_several_scalings_train_as_separate_heads() -> None:
    """The step in mhlora is that of each head alone, with its own s."""
    config = LTEConfig(num_heads=2, lora_r=2, lora_alpha=(4.0, 12.0))
    model = prepare_model_for_lte(nn.Sequential(nn.Linear(6, 5)), config, mode="mhlora", seed=SEED)
    (lora,) = [g for g in parameter_groups(model) if g["name"] == "lora"]
    a, b = lora["params"]
    assert lora["scalings"] == [[2.0, 6.0]]
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    alone = []
    for head, s in enumerate([2.0, 6.0]):
        pair = [nn.Parameter(p.detach()[head].clone()) for p in (a, b)]
        for p, stacked in zip(pair, (a, b), strict=True):
            p.grad = stacked.grad[head].clone()
        LoRAMuon([{"params": pair, "name": "lora", "scalings": [s]}]).step()
        alone.append(pair)
    LoRAMuon([lora]).step()
    for stacked, parts in zip((a, b), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in parts]), rtol=0, atol=1e-6)
