"""Scripts written for the authors' library (README, example, unit tests) run here with only their import changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import Tensor, nn

import lte_ray as lte
from lte_ray.modes import merged_state_dict

ROOT = Path(__file__).resolve().parent.parent
HEADS, CLASSES, SIZE = 4, 3, 8


class EncoderBlock(nn.Module):
    """Named and built as in torchvision's vision transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.dropout, self.ln_2 = nn.Dropout(0.0), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, input: Tensor) -> Tensor:
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Encoder(nn.Module):
    """The position embedding, the blocks and the last norm."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, width).normal_(std=0.02))
        self.layers, self.ln = nn.Sequential(EncoderBlock(width), EncoderBlock(width)), nn.LayerNorm(width)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.ln(self.layers(input + self.pos_embedding))
        return y


class VisionTransformer(nn.Module):
    """torchvision's in small: conv_proj, class_token, encoder, heads."""

    def __init__(self, width: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder((SIZE // patch) ** 2 + 1, width)
        self.heads = nn.Sequential(nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        y: Tensor = self.heads(self.encoder(x)[:, 0])
        return y


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer()


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy pictures of three classes."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (4 * HEADS,), generator=generator)
        yield means[labels] + 0.5 * torch.randn(len(labels), 3, SIZE, SIZE, generator=generator), labels


def train(model: nn.Module, merge: Callable[[], object], steps: int = 40) -> None:
    """The training loss falls to half of what it was, and evaluation with the merged weights gives as low a one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        merge()
        losses.append(loss.item())
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < first / 2
    merge()
    model.eval()
    x, y = next(batches(1))
    with torch.no_grad():
        assert F.cross_entropy(model(x), y).item() < first / 2


@pytest.mark.parametrize("only_linear", [True, False])
@pytest.mark.parametrize("mode", ["ddp", "dmp", "mhlora"])
def test_the_authors_example(mode: str, only_linear: bool) -> None:
    """examples/test.py: a vision transformer of linear layers only, or with convolution, norms and head as replicas."""
    model = vit()
    lte.misc.use_custom_attention(model)
    model.encoder.pos_embedding.requires_grad = False
    model.class_token.requires_grad = False
    replica_layers: list[nn.Module] = []
    if only_linear:
        lte.misc.replace_conv_proj_with_linear(model)
        lte.misc.disable_norm_affine_parameters(model)
    else:
        replica_layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.LayerNorm))]
        replica_layers.append(model.heads)
    model = lte.prepare_model_for_lte(
        model,
        lte.LTEConfig.default(lora_r=3, lora_alpha=32, num_heads=HEADS),
        replica_layers=replica_layers,
        mode=mode,
        strict=True,
    )
    assert f"heads={HEADS}, rank=3" in repr(model)
    count = sum(isinstance(m, lte.LTELayer) for m in model.modules())
    assert count == (10 if only_linear else 8)
    scheduler = lte.misc.merge.MergeCondition(model, merge_steps=5, method="step")
    train(model, scheduler.step, steps=60)


def test_the_authors_example_left_parameters_out() -> None:
    """Class token and positions, which they froze: an error by default, named or strict=False they train too."""
    cfg = lte.LTEConfig.default(lora_r=3, lora_alpha=32, num_heads=HEADS)
    with pytest.raises(lte.LTEError, match=r"2 parameter\(s\).*class_token, encoder\.pos_embedding"):
        lte.prepare_model_for_lte(vit(), cfg)
    model = lte.prepare_model_for_lte(vit(), cfg, replica_layers=["class_token", "encoder.pos_embedding"])

    def merge() -> None:
        for m in model.modules():
            if isinstance(m, (lte.LTELayer, lte.ReplicaLayer)):
                m.merge_parameters()

    train(model, merge)
    state, start = merged_state_dict(model), vit()
    assert not torch.equal(state["class_token"], start.class_token)
    start.load_state_dict(state)
    x, _ = next(batches(1))
    assert_near(start.eval()(x), model(x), 1e-5)  # float32


def test_the_authors_readme() -> None:
    """The three snippets: a batch in heads' parts, the merge loop, a layer to be ignored."""
    model = lte.prepare_model_for_lte(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
        lte.LTEConfig.default(lora_r=2, lora_alpha=4096, num_heads=32),
    )
    x = torch.randn(64, 6)
    assert x.size(0) % 32 == 0
    assert model(x).shape == (64, 2)
    for _, m in model.named_modules():
        if isinstance(m, (lte.LTELayer, lte.ReplicaLayer)):
            m.merge_parameters()
    torch.manual_seed(0)
    model = vit()
    model = lte.prepare_model_for_lte(
        model,
        lte.misc.LTEConfig.default(lora_r=2, lora_alpha=4096, num_heads=4),
        replica_layers=[model.heads, model.class_token, model.encoder.pos_embedding],
    )
    assert isinstance(model.heads, lte.MultiheadReplicaLayer)
    assert model(next(batches(1))[0]).shape == (16, CLASSES)


def test_the_authors_way_of_changing_the_config() -> None:
    """cfg.lora.x = ... and cfg.lora.linear.x = ...; what isn't there is a ValueError, as theirs."""
    cfg = lte.LTEConfig.default(lora_r=4, num_heads=2)
    assert (cfg.lora.lora_r, cfg.lora.lora_alpha, cfg.lora.lora_bias, cfg.lora.num_heads) == (4, 16, "frozen", 2)
    cfg.lora.lora_alpha = 8
    cfg.lora.linear.lora_r = 2
    model = lte.prepare_model_for_lte(nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)]), cfg)
    assert [(m.lora_r, m.scaling) for m in model] == [(2, 4.0), (4, 2.0)]
    for wrong in (lambda: lte.LTEConfig.default(rank=3), lambda: setattr(cfg.lora, "lora_rank", 3)):
        with pytest.raises(ValueError, match="rank"):
            wrong()


def pair(heads: int = HEADS, mode: str = "dmp") -> tuple[nn.Module, nn.Module]:
    """As the authors' tests set up their models: the same seed, another mode."""
    made = []
    for which in (mode, "ddp"):
        torch.manual_seed(0)
        cfg = lte.LTEConfig.default(lora_r=8, lora_alpha=16, num_heads=heads)
        made.append(lte.prepare_model_for_lte(nn.Sequential(nn.Linear(16, 32)), cfg, mode=which, strict=True).double())
    return made[0], made[1]


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
    """dmp and ddp stay together over 100 steps of AdamW on all parameters, a merge, and a reset after it."""
    models = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = torch.randn(8, 16, 16, generator=generator).double()
        outputs = [m(x) for m in models]
        for out, optimizer in zip(outputs, optimizers, strict=True):
            out.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_near(outputs[0], outputs[1], 1e-9)  # float64 rounding that 100 steps of Adam make grow
    for m in models:
        m[0].merge_parameters()
        if reset:
            m[0].reset_lora_parameters()
    assert_near(models[0](x), models[1](x), 1e-9)
    assert_near(models[0](x), models[0].eval()(x), 1e-12)  # right after a merge each head is at W, reset or not


def test_the_authors_unit_tests_on_gradients() -> None:
    """Merged at every step with SGD, every head's gradients are the same in both modes."""
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
    """A hand-written sum of heads, times 1/N, and heads merged at every step on the same data: outputs and gradients."""

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
    """With one head, mhlora and ddp merged at every step are the same under Adam."""
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
    """Copies start alike, aren't tied, and a merge of like ones changes nothing."""
    torch.manual_seed(0)
    model = lte.MultiheadReplicaLayer(nn.Sequential(nn.Linear(16, 32)).double(), HEADS)
    x = torch.randn(1, 16).double().repeat(HEADS, 1)
    assert all(torch.equal(y, model(x)[:1]) for y in model(x).chunk(HEADS))
    model.merge_parameters()
    assert all(torch.equal(y, model(x)[:1]) for y in model(x).chunk(HEADS))
    model.replicas[0][0].weight.data += 1
    first, *others = model(x).chunk(HEADS)
    assert all(not torch.allclose(first, y) for y in others)


class Pictures(nn.Module):
    """Convolution, a class token, attention, a norm, and an output layer to be a replica."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.norm, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y: Tensor = self.out(self.norm(x + self.attention(x, x, x)[0])[:, 0])
        return y


def same_in_both_modes(device: str, chunk: str) -> list[nn.Module]:
    """Trains ddp and dmp on the same batches with merges, and asserts that they are one model."""
    models = []
    for mode in ("ddp", "dmp"):
        torch.manual_seed(0)
        model = lte.prepare_model_for_lte(
            Pictures().double().to(device),
            lte.LTEConfig(num_heads=HEADS, lora_r=2, lora_alpha=4.0),
            mode=mode,
            chunk=chunk,
            replica_layers=["out", "token"],
            seed=3,
        )
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        merges = lte.misc.MergeCondition(model, 3)
        for x, y in batches(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double().to(device)), y.to(device)).backward()
            optimizer.step()
            merges.step()
        models.append(model)
    ddp, dmp = (merged_state_dict(m) for m in models)
    for name, value in ddp.items():
        # 1e-8: float64 sums in another order, which Adam makes grow; other arithmetic is off by 1e-3 and more.
        assert_near(dmp[name].cpu(), value.cpu(), 1e-8)
    x = next(batches(1))[0].double().to(device)
    assert_near(models[1](x).cpu(), models[0](x).cpu(), 1e-8)
    assert_near(models[1].eval()(x).cpu(), models[0].eval()(x).cpu(), 1e-8)
    return models


@pytest.mark.parametrize("chunk", ["layer", "model"])
def test_ddp_is_dmp_on_a_cpu(chunk: str) -> None:
    """A model with convolution, attention, a lone parameter and a replica, with three merges."""
    same_in_both_modes("cpu", chunk)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk", ["layer", "model"])
def test_ddp_is_dmp_over_all_visible_gpus(chunk: str) -> None:
    """The same with dmp's copies and replicas spread round robin over the devices, which they stay on."""
    _, dmp = same_in_both_modes("cuda", chunk)
    count = torch.cuda.device_count()
    for copies in (dmp.conv.layers, dmp.conv.lora_A, dmp.conv.lora_B, dmp.out.replicas):
        for head, part in enumerate(copies):
            assert {p.device.index for p in part.parameters()} == {head % count}


def test_the_page_for_their_users_names_tests_that_exist() -> None:
    """Every test on docs/from-lte.md is one of the file that the page names with it, and each file is there."""
    page = (ROOT / "docs" / "from-lte.md").read_text()
    pairs = re.findall(r"`(test_\w+)`: `(test_\w+)`", page)
    assert len(re.findall(r"`test_\w+`", page)) == 2 * len(pairs) > 20
    for file, name in pairs:
        assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), name
