"""Small models for the in-process modes, and loops that train them in one process and as separate Ray heads."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray import LTEConfig, prepare_model_for_lte
from lte_ray.adapters import convert
from lte_ray.merging.flat_buffer import base_replicas, gather, replica_part, replica_views, views
from lte_ray.merging.low_rank import Share, add_contributions, new_reference
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.numerics import assert_near

MODES = ["ddp", "dmp", "mhlora"]
HEADS, SEED = 2, 3
STEPS, MERGE_STEPS = 11, 4
"""Two merges, the second with a reference that isn't zero, and three steps after them."""
LTE = LTEConfig(
    num_heads=HEADS, lora_r=(2, 1), lora_alpha=(4.0, 3.0), adapt=("linear", "attention", "conv", "embedding", "norm")
)
UNIFORM = LTEConfig(num_heads=HEADS, lora_r=2, lora_alpha=4.0)


class Attention(nn.Module):
    """Self-attention with learned keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x)[0])
        return y


class Tied(nn.Module):
    """Embedding and output tied, two layers that share a weight, one called twice, a lone parameter, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.embed, self.mid, self.twin = nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.twin.weight = self.mid.weight
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.mid(self.embed(words) * self.scale))
        x = self.twin(torch.tanh(self.twin(x)))
        y: Tensor = self.out(self.norm(x.mT).mT)
        return y


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model and its inputs: `shape` is that of one sample; `words`: inputs are indices below 7, not numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: bool = False

    def build(self) -> nn.Module:
        """The model in float64, the same each time."""
        torch.manual_seed(0)
        return self.make().double()

    def batch(self, step: int, samples: int = 4) -> tuple[Tensor, Tensor]:
        """Inputs, and a number for each sample's loss."""
        generator = torch.Generator().manual_seed(step)
        shape = (samples, *self.shape)
        x = torch.randint(7, shape, generator=generator) if self.words else torch.randn(shape, generator=generator).double()
        return x, torch.randn(samples, generator=generator).double()


LAYERS: dict[str, ModelCase] = {
    "linear": ModelCase(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), (3, 5)),
    "conv1d": ModelCase(lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 6)),
    "conv2d": ModelCase(lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding="valid", bias=False), (2, 6, 5)),
    "conv2d-padded": ModelCase(lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 4, 4)),
    "conv3d": ModelCase(lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 3, 3, 4)),
    "embedding": ModelCase(lambda: nn.Embedding(7, 4, padding_idx=1), (3,), words=True),
    "layer-norm": ModelCase(lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4)), (5,)),
    "rms-norm": ModelCase(lambda: nn.Sequential(nn.RMSNorm(5), nn.Linear(5, 4)), (5,)),
    "group-norm": ModelCase(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 3, 1)), (4, 3)),
    "batch-norm": ModelCase(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 1)), (4, 3)),
    "attention": ModelCase(Attention, (3, 4)),
    "tied": ModelCase(Tied, (3,), words=True),
}
LINEAR = LAYERS["linear"]


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (torch.sin(y).flatten(1).mean(1) - target).square().mean()


def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad], lr=0.01)


def train_heads(case: ModelCase, lte: LTEConfig, steps: int = STEPS) -> tuple[dict[str, Tensor], list[nn.Module]]:
    """Trains each head alone, as Ray heads do, and merges as their coordinator does.

    Returns:
        The merged base by names, and the heads' models.
    """
    heads = [convert(case.build(), lte, seed=SEED, head=head) for head in range(HEADS)]
    optimizers = [adam([*head.factors.values(), *head.replicas().values()]) for head in heads]
    base = gather(heads[0].plan.base, heads[0].tensors(), torch.float64)
    references: list[Tensor | None] = [None] * HEADS
    for step in range(1, steps + 1):
        x, target = case.batch(step)
        for head, optimizer, part, aim in zip(heads, optimizers, x.chunk(HEADS), target.chunk(HEADS), strict=True):
            optimizer.zero_grad()
            loss(head.model(part), aim).backward()
            optimizer.step()
        if step % MERGE_STEPS:
            continue
        shares = []
        for head, reference in zip(heads, references, strict=True):
            sent = gather(head.plan.contribution, {**head.tensors(), **head.factors}, torch.float64)
            replica_part(head.plan, sent).sub_(base_replicas(head.plan, base))
            shares.append(Share(1 / HEADS, head.plan, sent, reference))
        add_contributions(base, shares)
        references = [new_reference(share, lte.reset) for share in shares]
        for head, reference in zip(heads, references, strict=True):
            _adopt_base(head, base, reference)
    return views(heads[0].plan.base, base), [head.model for head in heads]


@torch.no_grad()
def _adopt_base(head: Any, base: Tensor, reference: Tensor | None) -> None:
    weights, tensors = views(head.plan.base, base), head.tensors()
    for spec in head.plan.adapted:
        if reference is None:
            head.factors[spec.b_name].zero_()
        pair = (head.factors[spec.a_name].detach(), head.factors[spec.b_name].detach())
        head.main_weights[spec.name].load(weights[spec.name], None if reference is None else pair)
    for name, value in replica_views(head.plan, base_replicas(head.plan, base)).items():
        tensors[name].copy_(value)


def train_mode(case: ModelCase, lte: LTEConfig, mode: str, chunk: str = "layer", steps: int = STEPS) -> nn.Module:
    """Trains all heads in one model. The loss counts H times, so that each head's gradient is that of its own mean loss."""
    model = prepare(case, mode, lte, chunk=chunk)
    optimizer, merges = adam(model.parameters()), MergeCondition(model, MERGE_STEPS)
    for step in range(1, steps + 1):
        x, target = case.batch(step)
        optimizer.zero_grad()
        (HEADS * loss(model(x), target)).backward()
        optimizer.step()
        merges.step()
    return model


def assert_like_heads(model: nn.Module, expected: tuple[dict[str, Tensor], list[nn.Module]], x: Tensor) -> None:
    """Merged weights equal those of heads that trained alone (`train_heads`), and so do all outputs in training."""
    base, heads = expected
    state = merged_state_dict(model)
    # 1e-9: float64 rounding, which Adam makes grow; other arithmetic is off by 1e-3 and more.
    for name, value in base.items():
        assert_near(state[name], value, 1e-9)
    assert_near(model(x), torch.cat([head(part) for head, part in zip(heads, x.chunk(HEADS), strict=True)]), 1e-9)


def prepare(case: ModelCase, mode: str, lte: LTEConfig = LTE, **settings: Any) -> nn.Module:
    """The case's model in a mode, with a fixed seed and without the special scaling of attention."""
    settings = {"strict": False, "seed": SEED, "use_special_attention_scaling": False} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*train without LoRA")
        return prepare_model_for_lte(case.build(), lte, mode=mode, **settings)


def one_linear(mode: str, *, bias: bool = True, lte: LTEConfig = UNIFORM) -> nn.Module:
    """A model of one linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias)).double()
    return prepare_model_for_lte(model, lte, mode=mode, seed=SEED)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


@torch.no_grad()
def perturb(model: nn.Module) -> nn.Module:
    """Adds noise to everything that trains, so that heads differ; padded ranks stay zero."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
            p.add_(noise * (p != 0) if "lora_A" in name else noise)
    for module in model.modules():
        if hasattr(module, "lora_B_weight"):
            for head, spec in enumerate(module.specs):
                module.lora_B_weight[head, :, spec.rank :] = 0
    return model


def head_device_on_meta(head: int, main_device: torch.device) -> torch.device:
    """Stands for `dmp.head_device` on a machine without a second device."""
    return torch.device("meta") if head == 1 else main_device


def device_types(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}
