"""What goes wrong in the authors' library works here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lte_ray import LTEConfig, prepare_model_for_lte
from lte_ray.misc import MergeCondition, use_custom_attention
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import MODES, UNIFORM, factors, one_linear, perturb
from tests.support.numerics import assert_near


@pytest.mark.parametrize("mode", MODES)
def test_the_authors_reset_kept_the_old_reference(mode: str) -> None:
    """`reset_lora_parameters` draws another A and leaves every head at W, which keeps everything that was merged."""
    model = perturb(one_linear(mode))
    layer = model[0]
    layer.merge_parameters()
    weight, old = layer.weight.clone(), factors(model)[0].detach().clone()
    layer.reset_lora_parameters()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_near(model(x) - x @ weight.T, model(torch.zeros_like(x)), 1e-14)
    assert torch.equal(layer.weight, weight)
    assert not torch.equal(factors(model)[0], old)


@pytest.mark.parametrize("mode", MODES)
def test_the_authors_dmp_failed_without_bias(mode: str) -> None:
    """bias=False: trains, merges, and evaluates."""
    model = perturb(one_linear(mode, bias=False))
    MergeCondition(model).merge()
    assert model.train()(torch.ones(2, 5, dtype=torch.float64)).shape == (2, 4)
    assert list(merged_state_dict(model)) == ["0.weight"]


def test_the_authors_mhlora_lacked_one_over_n() -> None:
    """Equal heads compute what one of them does, however many they are."""
    x = torch.randn(3, 5, dtype=torch.float64)
    outputs = []
    for heads in (1, 4):
        model = one_linear("mhlora", lte=LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0))
        with torch.no_grad():
            for p in factors(model):
                p.copy_(torch.linspace(-1, 1, p[0].numel()).view(p[0].shape).expand(p.shape))
        outputs.append(model(x))
    assert_near(outputs[1], outputs[0], 1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_the_authors_attention_dropped_out_in_evaluation(mode: str) -> None:
    """Evaluation gives the same twice, and what the model computes without dropout."""
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    original = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)).double().eval()
    with torch.no_grad():
        expected = original(x)
    model = use_custom_attention(copy.deepcopy(original)).train()
    prepare_model_for_lte(model, UNIFORM, mode=mode)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        assert_near(model.eval()(x), expected, 1e-14)
        assert torch.equal(model(x), model(x))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_the_authors_dmp_kept_dense_changes_of_all_heads(mode: str) -> None:
    """No tensor of H x out x in is formed in a merge or stored: only factors, one weight, and the copies."""
    heads, width = 4, 32
    torch.manual_seed(0)
    lte = LTEConfig(num_heads=heads, lora_r=1, lora_alpha=2.0, lora_bias="frozen")
    model = prepare_model_for_lte(nn.Sequential(nn.Linear(width, width)), lte, mode=mode)
    before = sum(t.numel() for t in model.state_dict().values())
    largest = LargestTensor()
    with largest:
        for _ in range(2):
            MergeCondition(model).merge()
    assert largest.elements == width * width
    after = sum(t.numel() for t in model.state_dict().values())
    copies = heads * width * width if mode == "dmp" else 0
    numbers = 3  # `merged`, the seed, and the number of draws
    assert before == after == width * width + width + numbers + copies + 2 * heads * 2 * width


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_bfloat16_models_are_merged_in_float32(mode: str) -> None:
    """The merge of a bfloat16 weight is the float32 result, rounded once."""
    model = one_linear(mode, lte=LTEConfig(num_heads=2, lora_r=2, lora_alpha=4.0, lora_bias="frozen")).to(torch.bfloat16)
    perturb(model)
    exact = copy.deepcopy(model).float()
    for m in (model, exact):
        MergeCondition(m).merge()
    assert torch.equal(model[0].weight, exact[0].weight.to(torch.bfloat16))
