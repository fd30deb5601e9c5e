"""Scripts written for the authors' library (README, example) run here with only their import changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_ray as lte
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import MODES
from tests.support.numerics import assert_near

HEADS, CLASSES, SIZE = 4, 10, 8
AUTHORS_SETTINGS = {"lora_r": 32, "lora_alpha": 4096, "num_heads": 32}  # of README and example


class EncoderBlock(nn.Module):
    """A block of torchvision's vision transformers."""

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
    """A small version of torchvision's: conv_proj, class_token, encoder, heads."""

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


def train(model: nn.Module, merge: Callable[[], object], steps: int = 20, size: int = 4 * HEADS, lr: float = 3e-3) -> None:
    """Asserts that the training loss falls by half, and that evaluation with the merged weights is as low."""
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


@pytest.mark.parametrize(
    ("mode", "only_linear", "heads"),
    [
        ("ddp", True, 4),
        ("dmp", False, 4),
        ("mhlora", True, 4),
        *(pytest.param(mode, only, 32, marks=pytest.mark.slow) for mode in MODES for only in (True, False)),
    ],
)
def test_the_authors_example(mode: str, only_linear: bool, heads: int) -> None:
    """examples/test.py: a vision transformer of linear layers only, or with convolution, norms, and head as replicas.

    Their example has 32 heads; with four, it takes a tenth of the time.
    """
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
        lte.LTEConfig.default(**AUTHORS_SETTINGS | {"num_heads": heads}),
        replica_layers=replica_layers,
        mode=mode,
        strict=True,
    )
    assert f"heads={heads}, rank=32" in repr(model)
    count = sum(isinstance(m, lte.LTELayer) for m in model.modules())
    assert count == (10 if only_linear else 8)
    scheduler = lte.misc.merge.MergeCondition(model, merge_steps=5, method="step")
    train(model, scheduler.step, steps=30 if heads == 32 else 20, size=64 if heads == 32 else 16, lr=1e-4)


def test_the_authors_example_left_parameters_out() -> None:
    """Class token and positions, which their example freezes: an error by default; if named, they train too."""
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
    """Its three snippets: a batch split over heads, the merge loop, and layers without LoRA."""
    model = lte.prepare_model_for_lte(
        nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
        lte.LTEConfig.default(**AUTHORS_SETTINGS),
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
        lte.misc.LTEConfig.default(**AUTHORS_SETTINGS),
        replica_layers=[model.heads, model.class_token, model.encoder.pos_embedding],
    )
    assert isinstance(model.heads, lte.MultiheadReplicaLayer)
    assert model(next(batches(1, 64))[0]).shape == (64, CLASSES)


def test_the_authors_way_of_changing_the_config() -> None:
    """cfg.lora.x = ... and cfg.lora.linear.x = ...; an unknown setting is a ValueError, as in theirs."""
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
    """lora_config and target_module by keyword; settings by key, in a clone, and through override_kwargs."""
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


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_model_gets_lora_everywhere(mode: str) -> None:
    """Freeze all, then add LoRA: only layers of the adapted kinds train. In a partly frozen model, the frozen part stays so."""
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
    """If it is accepted, lora_bias="lora" gives the frozen biases of adapted layers their factors."""
    model = vit().requires_grad_(False)
    with pytest.raises(lte.LTEError, match="no_such"):
        lte.prepare_model_for_lte(model, lte.LTEConfig(num_heads=2, lora_r=2), replica_layers=["no_such"])
    assert not any(p.requires_grad for p in model.parameters())
    model = lte.prepare_model_for_lte(model, lte.LTEConfig(num_heads=2, lora_r=2, lora_bias="lora"), replica_layers=["heads"])
    assert isinstance(model.encoder.layers[0].mlp[0].lora_bias, nn.Module)
