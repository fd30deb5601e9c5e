"""Scripts written for the authors' library (README, example, unit tests) run here with only their import changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_ray as lte
from lte_ray.modes import merged_state_dict
from tests.support.helpers import assert_near

HEADS, CLASSES, SIZE = 4, 10, 8
THEIRS = {"lora_r": 32, "lora_alpha": 4096, "num_heads": 32}  # README, example


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

    def __init__(self, width: int = 32, patch: int = 4) -> None:
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


def batches(steps: int, size: int = 4 * HEADS) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy pictures of ten classes."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        yield means[labels] + 0.5 * torch.randn(len(labels), 3, SIZE, SIZE, generator=generator), labels


def train(model: nn.Module, merge: Callable[[], object], steps: int = 40, size: int = 4 * HEADS, lr: float = 3e-3) -> None:
    """The training loss falls to half of what it was, and evaluation with the merged weights gives as low a one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for x, y in batches(steps, size):
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
        lte.LTEConfig.default(**THEIRS),
        replica_layers=replica_layers,
        mode=mode,
        strict=True,
    )
    assert "heads=32, rank=32" in repr(model)
    count = sum(isinstance(m, lte.LTELayer) for m in model.modules())
    assert count == (10 if only_linear else 8)
    scheduler = lte.misc.merge.MergeCondition(model, merge_steps=5, method="step")
    train(model, scheduler.step, steps=30, size=64, lr=6e-4)


def test_the_authors_example_left_parameters_out() -> None:
    """Class token and positions, which they froze: an error by default, named or strict=False they train too."""
    cfg = lte.LTEConfig.default(lora_r=32, lora_alpha=256, num_heads=HEADS)
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
        nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
        lte.LTEConfig.default(**THEIRS),
    )
    assert [(m.lora_r, m.scaling) for m in model if isinstance(m, lte.LTELayer)] == [(32, 128.0), (CLASSES, 128.0)]
    x = torch.randn(64, 48)
    assert x.size(0) % 32 == 0
    assert model(x).shape == (64, CLASSES)
    for _, m in model.named_modules():
        if isinstance(m, (lte.LTELayer, lte.ReplicaLayer)):
            m.merge_parameters()
    torch.manual_seed(0)
    model = vit()
    model = lte.prepare_model_for_lte(
        model,
        lte.misc.LTEConfig.default(**THEIRS),
        replica_layers=[model.heads, model.class_token, model.encoder.pos_embedding],
    )
    assert isinstance(model.heads, lte.MultiheadReplicaLayer)
    assert model(next(batches(1, 64))[0]).shape == (64, CLASSES)


def test_the_authors_way_of_changing_the_config() -> None:
    """cfg.lora.x = ... and cfg.lora.linear.x = ...; what isn't there is a ValueError, as theirs."""
    cfg = lte.LTEConfig.default(lora_r=4, num_heads=2)
    assert (cfg.lora.lora_r, cfg.lora.lora_alpha, cfg.lora.lora_bias, cfg.lora.num_heads) == (4, 16, False, 2)
    cfg.lora.lora_alpha = 8
    cfg.lora.linear.lora_r = 2
    model = lte.prepare_model_for_lte(nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)]), cfg)
    assert [(m.lora_r, m.scaling) for m in model] == [(2, 4.0), (4, 2.0)]
    for wrong in (lambda: lte.LTEConfig.default(rank=3), lambda: setattr(cfg.lora, "lora_rank", 3)):
        with pytest.raises(ValueError, match="rank"):
            wrong()


def test_the_authors_names_of_arguments() -> None:
    """lora_config and target_module by keyword; settings by key, in a copy, and through override_kwargs."""
    cfg = lte.LTEConfig.override_kwargs(lte.LTEConfig.default(), {"lora_r": 4, "num_heads": 2})
    with pytest.raises(ValueError, match="rank"):
        lte.LTEConfig.override_kwargs(cfg, {"rank": 3})
    assert not cfg.lora.lora_bias
    other = cfg.lora.clone()
    other["lora_r"] = 2
    assert (cfg.lora["lora_r"], other.lora_r) == (4, 2)
    model = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4)), lora_config=cfg)
    assert (model[0].lora_r, model[0].num_heads, bool(model[0].lora_initialized)) == (4, 2, True)
    layer = lte.MultiheadReplicaLayer(target_module=nn.Linear(4, 4), num_heads=2)
    assert len(layer.replicas) == 2
    attention = [lte.misc.MultiheadAttention(embed_dim=8, num_heads=2, split_qkv=split) for split in (True, False)]
    assert [(m.heads, m.split_qkv) for m in attention] == [(2, True), (2, False)]


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_the_authors_methods_of_layers(mode: str) -> None:
    """get_lora_params, compute_delta and lora_to_delta are stacked by head; a merge adds the mean of compute_delta."""
    cfg = lte.LTEConfig.default(lora_r=(2, 3), lora_alpha=(4, 3), num_heads=2, lora_bias=True)
    layer = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)), cfg, mode=mode)[0].double()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    if mode == "ddp":  # what is beyond a head's rank stays zero
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
    """lora_A[i].weight reads, sets and has the gradient of the head's part of the stack."""
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


def their_state(mode: str, merged: bool, rank: int, shape: tuple[int, int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A layer's state dict with the keys that the authors' layers give it, and each head's dense weight; s = 2."""
    out, width = shape
    made = torch.Generator().manual_seed(0)
    w, bias, *factors = (
        torch.randn(size, generator=made, dtype=torch.float64)
        for size in (shape, (out,), *[(HEADS, rank, width), (HEADS, out, rank)] * 2)
    )
    a, b, prev_a, prev_b = (f if merged or i < 2 else torch.zeros_like(f) for i, f in enumerate(factors))
    state = {"weight": w, "bias": bias, "merged": torch.full((1,), float(merged)), "lora_initialized": torch.ones(1)}
    held = 2 * prev_b @ prev_a
    if mode == "ddp":
        state |= {"lora_A_weight": a, "lora_B_weight": b, "prev_lora_A_weight": prev_a, "prev_lora_B_weight": prev_b}
        state |= {"lora_A.weight": a[0], "lora_B.weight": b[0]}
    else:
        for h in range(HEADS):
            state |= {f"lora_A.{h}.weight": a[h], f"lora_B.{h}.weight": b[h]}
            state |= {f"layers.{h}.weight": w - held[h], f"layers.{h}.bias": bias}
        if merged:
            state["prev_delta_weights"] = held
    return state, list(w + 2 * b @ a - held)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5)])
@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_the_authors_checkpoints_are_loaded(mode: str, shape: tuple[int, int], merged: bool) -> None:
    """Every head computes what it did there, before and after a merge; where the rank is cut to min(out, in) too."""
    state, dense = their_state(mode, merged, 4, shape)
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
    own = model.state_dict()
    model.load_state_dict(own)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    cfg.lora.reset = "B"
    model = lte.prepare_model_for_lte(nn.Sequential(nn.Linear(shape[1], shape[0])), cfg, mode=mode)
    with pytest.raises(lte.LTEError, match="reset='none'"):
        model.load_state_dict({f"0.{name}": value for name, value in state.items()})


def test_the_authors_checkpoints_of_replicas_are_loaded() -> None:
    """They hold copies only; evaluation uses the mean."""
    layer = lte.MultiheadReplicaLayer(nn.Sequential(nn.Linear(3, 2)), HEADS)
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items() if name.startswith("replicas.")}
    layer.load_state_dict(state)
    assert torch.equal(layer.replicas[1][0].weight, state["replicas.1.0.weight"])
    mean = torch.stack([state[f"replicas.{h}.0.weight"] for h in range(HEADS)]).mean(0)
    assert_near(layer.main[0].weight, mean, 1e-6)  # float32
    with pytest.raises(RuntimeError, match=r"Missing key.*main.0.weight"):
        layer.load_state_dict({name: value for name, value in state.items() if "replicas.1" not in name})


@pytest.mark.parametrize("mode", ["ddp", "dmp", "mhlora"])
def test_a_model_in_which_nothing_trains_gets_lora_everywhere(mode: str) -> None:
    """Freeze all, then add LoRA: layers of the adapted kinds train, nothing else does; a partly frozen model is respected."""
    model = vit().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = lte.prepare_model_for_lte(model, lte.LTEConfig(num_heads=2, lora_r=2), mode=mode, replica_layers=["heads"])
    assert sum(isinstance(m, lte.LTELayer) for m in model.modules()) == 9
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    x, y = next(batches(1))
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in merged_state_dict(model).items())
    partly = vit().requires_grad_(False)
    partly.heads.requires_grad_(True)
    partly = lte.prepare_model_for_lte(partly, lte.LTEConfig.default(num_heads=2, lora_r=2), mode=mode)
    assert [name for name, m in partly.named_modules() if isinstance(m, lte.LTELayer)] == ["heads.0"]


def test_a_frozen_model_that_is_refused_stays_frozen() -> None:
    """And lora_bias=True gives the frozen biases of adapted layers their adapters."""
    model = vit().requires_grad_(False)
    with pytest.raises(lte.LTEError, match="no_such"):
        lte.prepare_model_for_lte(model, lte.LTEConfig(num_heads=2, lora_r=2), replica_layers=["no_such"])
    assert not any(p.requires_grad for p in model.parameters())
    made = lte.prepare_model_for_lte(model, lte.LTEConfig(num_heads=2, lora_r=2, lora_bias="lora"), replica_layers=["heads"])
    assert isinstance(made.encoder.layers[0].mlp[0].lora_bias, nn.Module)


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
        self.attention, self.norm, self.out = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )

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
