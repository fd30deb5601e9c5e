"""The authors' unit tests, on this library's layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lte_ray as lte
from tests.support.numerics import assert_near

HEADS = 4


def pair(heads: int = HEADS, mode: str = "dmp") -> tuple[nn.Module, nn.Module]:
    """Two models with the same seed, in `mode` and in ddp, as the authors' tests set them up."""
    models = []
    for which in (mode, "ddp"):
        torch.manual_seed(0)
        cfg = lte.LTEConfig.default(lora_r=8, lora_alpha=16, num_heads=heads)
        models.append(lte.prepare_model_for_lte(nn.Sequential(nn.Linear(16, 32)), cfg, mode=which, strict=True).double())
    return models[0], models[1]


def test_the_authors_unit_tests_on_parameters() -> None:
    """dmp holds more parameters than ddp; W, A and B of each head are the same, and may be set through `.data`."""
    dmp, ddp = pair()
    assert sum(p.numel() for p in dmp.parameters()) != sum(p.numel() for p in ddp.parameters())
    assert not dmp[0].lora_bias
    for i in range(HEADS):
        dmp[0].lora_A[i].weight.data = ddp[0].lora_A_weight[i].data.clone().to(device=dmp[0].lora_A[i].weight.device)
        assert torch.equal(ddp[0].weight.cpu(), dmp[0].layers[i].weight.cpu())
        assert torch.equal(ddp[0].bias, dmp[0].layers[i].bias)
        assert torch.equal(ddp[0].lora_A_weight[i], dmp[0].lora_A[i].weight)
        assert torch.equal(ddp[0].lora_B_weight[i], dmp[0].lora_B[i].weight)


@pytest.mark.parametrize("reset", [False, True])
def test_the_authors_unit_tests_on_training_and_merging(reset: bool) -> None:
    """dmp and ddp stay equal over steps of AdamW on all parameters, a merge, and a reset after it."""
    models = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        x = torch.randn(8, 16, 16, generator=generator).double()
        outputs = [m(x) for m in models]
        for out, optimizer in zip(outputs, optimizers, strict=True):
            out.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_near(outputs[0], outputs[1], 1e-9)  # float64 rounding, which Adam makes grow
    for m in models:
        m[0].merge_parameters()
        if reset:
            m[0].reset_lora_parameters()
    assert_near(models[0](x), models[1](x), 1e-9)
    assert_near(models[0](x), models[0].eval()(x), 1e-12)  # right after a merge each head computes with W, reset or not


def test_the_authors_unit_tests_on_gradients() -> None:
    """With SGD and a merge after every step, each head's gradients are the same in both modes."""
    dmp, ddp = pair()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (dmp, ddp)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, y = (torch.randn(16, 8, width, generator=generator).double() for width in (16, 32))
        for m, optimizer in zip((dmp, ddp), optimizers, strict=True):
            optimizer.zero_grad()
            (m(x) - y).mean().backward()
        for i in range(HEADS):
            assert_near(dmp[0].lora_A[i].weight.grad, ddp[0].lora_A_weight.grad[i], 1e-12)
            assert_near(dmp[0].lora_B[i].weight.grad, ddp[0].lora_B_weight.grad[i], 1e-12)
        for m, optimizer in zip((dmp, ddp), optimizers, strict=True):
            optimizer.step()
            m[0].merge_parameters()


@pytest.mark.parametrize("which", ["dmp", "ddp"])
def test_the_authors_unit_tests_on_multi_head_lora(which: str) -> None:
    """Equal to a hand-written sum of heads times 1/N, with the same data for all heads and a merge after every step."""

    class MultiheadLoRA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 32).requires_grad_(False)
            self.lora_A = nn.ModuleList([nn.Linear(16, 8, bias=False) for _ in range(HEADS)])
            self.lora_B = nn.ModuleList([nn.Linear(8, 32, bias=False) for _ in range(HEADS)])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            for a, b in zip(self.lora_A, self.lora_B, strict=True):
                y = y + 16 / 8 / HEADS * b(a(x))
            return y

    dmp, ddp = pair()
    model, joint = dmp if which == "dmp" else ddp, MultiheadLoRA().double()
    joint.linear.weight.data = dmp[0].layers[0].weight.data.clone()
    joint.linear.bias.data = dmp[0].layers[0].bias.data.clone()
    for i in range(HEADS):
        joint.lora_A[i].weight.data = dmp[0].lora_A[i].weight.data.clone()
        joint.lora_B[i].weight.data = dmp[0].lora_B[i].weight.data.clone()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, joint)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, y = (torch.randn(2, 8, width, generator=generator).double() for width in (16, 32))
        out, many = joint(x), model(x.repeat(HEADS, 1, 1)).unflatten(0, (HEADS, 2))
        assert_near(many.mean(0), out, 1e-12)
        (out - y).mean().backward()
        (many - y.repeat(HEADS, 1, 1).unflatten(0, (HEADS, 2))).mean().backward()
        for i in range(HEADS):
            a = model[0].lora_A[i].weight.grad if which == "dmp" else model[0].lora_A_weight.grad[i]
            b = model[0].lora_B[i].weight.grad if which == "dmp" else model[0].lora_B_weight.grad[i]
            assert_near(a, joint.lora_A[i].weight.grad, 1e-12)
            assert_near(b, joint.lora_B[i].weight.grad, 1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model[0].merge_parameters()


def test_the_authors_unit_tests_on_one_head() -> None:
    """With one head, mhlora equals ddp merged after every step of Adam."""
    joint, merging = pair(heads=1, mode="mhlora")
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (joint, merging)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, y = (torch.randn(16, 8, width, generator=generator).double() for width in (16, 32))
        outputs = [m(x) for m in (joint, merging)]
        assert_near(outputs[0], outputs[1], 1e-9)
        for out, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (out - y).mean().backward()
            optimizer.step()
        merging[0].merge_parameters()


def test_the_authors_unit_tests_on_replicas() -> None:
    """Copies start equal and aren't tied; a merge of equal copies changes nothing."""
    torch.manual_seed(0)
    model = lte.MultiheadReplicaLayer(nn.Sequential(nn.Linear(16, 32)).double(), HEADS)
    x = torch.randn(1, 16).double().repeat(HEADS, 1)
    assert all(torch.equal(y, model(x)[:1]) for y in model(x).chunk(HEADS))
    model.merge_parameters()
    assert all(torch.equal(y, model(x)[:1]) for y in model(x).chunk(HEADS))
    model.replicas[0][0].weight.data += 1
    first, *others = model(x).chunk(HEADS)
    assert all(not torch.allclose(first, y) for y in others)
