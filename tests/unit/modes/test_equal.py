"""The in-process modes against the Ray heads' layers: the same data, optimizer and merges give the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters import convert
from lte_ray.config import LTEConfig
from lte_ray.merging.flat_buffer import as_matrix, base_replicas, gather, replica_part, replica_views, views
from lte_ray.merging.low_rank import Share, add_contributions, new_reference
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict, prepare_model_for_lte
from tests.support.helpers import LONG_RUN, assert_near

HEADS, SEED, STEPS, MERGE = 2, 3, 100 if LONG_RUN else 40, 5
LTE = LTEConfig(
    num_heads=HEADS, lora_r=(2, 1), lora_alpha=(4.0, 3.0), adapt=("linear", "attention", "conv", "embedding", "norm")
)


class Attention(nn.Module):
    """Self-attention with all that nn.MultiheadAttention may have beside projections."""

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


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding="valid", bias=False), (2, 6, 5)),
    "conv2d-padded": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 3, 3, 4)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=1), (3,)),
    "layer-norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4)), (5,)),
    "rms-norm": (lambda: nn.Sequential(nn.RMSNorm(5), nn.Linear(5, 4)), (5,)),
    "group-norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 3, 1)), (4, 3)),
    "batch-norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 1)), (4, 3)),
    "attention": (Attention, (3, 4)),
    "tied": (Tied, (3,)),
}
WORDS = ("embedding", "tied")


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().double()


def batch(kind: str, step: int, samples: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and a number for each output's loss, different for each sample."""
    generator = torch.Generator().manual_seed(step)
    shape = (samples, *MODELS[kind][1])
    x = torch.randint(7, shape, generator=generator) if kind in WORDS else torch.randn(shape, generator=generator).double()
    return x, torch.randn(samples, generator=generator).double()


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (torch.sin(y).flatten(1).mean(1) - target).square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train_heads(kind: str, lte: LTEConfig) -> tuple[dict[str, Tensor], list[nn.Module]]:
    """Every head alone, as Ray heads are, merged as their coordinator does; the merged base by names, and the heads."""
    heads = [convert(build(kind), lte, seed=SEED, head=head) for head in range(HEADS)]
    optimizers = [adam(head.model) for head in heads]
    base = gather(heads[0].plan.base, heads[0].tensors(), torch.float64)
    references: list[Tensor | None] = [None] * HEADS
    for step in range(1, STEPS + 1):
        x, target = batch(kind, step)
        for head, optimizer, own, aim in zip(heads, optimizers, x.chunk(HEADS), target.chunk(HEADS), strict=True):
            optimizer.zero_grad()
            loss(head.model(own), aim).backward()
            optimizer.step()
        if step % MERGE:
            continue
        shares = []
        for head, reference in zip(heads, references, strict=True):
            sent = gather(head.plan.contribution, {**head.tensors(), **head.factors}, torch.float64)
            replica_part(head.plan, sent).sub_(base_replicas(head.plan, base))
            shares.append(Share(1 / HEADS, head.plan, sent, reference))
        add_contributions(base, shares)
        references = [new_reference(share, lte.reset) for share in shares]
        for head, reference in zip(heads, references, strict=True):
            load(head, base, reference)
    return views(heads[0].plan.base, base), [head.model for head in heads]


@torch.no_grad()
def load(head, base: Tensor, reference: Tensor | None) -> None:  # type: ignore[no-untyped-def]
    weights, tensors = views(head.plan.base, base), head.tensors()
    for spec in head.plan.adapted:
        if reference is None:
            head.factors[spec.b].zero_()
        pair = (head.factors[spec.a].detach(), head.factors[spec.b].detach())
        head.main_weights[spec.name].load(weights[spec.name], None if reference is None else pair)
    for name, value in replica_views(head.plan, base_replicas(head.plan, base)).items():
        tensors[name].copy_(value)


def train_mode(kind: str, lte: LTEConfig, mode: str, chunk: str = "layer") -> nn.Module:
    """All heads in one model. The loss counts H times, so that each head's gradient is that of its own mean loss."""
    model = prepare_model_for_lte(
        build(kind), lte, strict=False, mode=mode, use_special_attention_scaling=False, seed=SEED, chunk=chunk
    )
    optimizer, merges = adam(model), MergeCondition(model, MERGE)
    for step in range(1, STEPS + 1):
        x, target = batch(kind, step)
        optimizer.zero_grad()
        (HEADS * loss(model(x), target)).backward()
        optimizer.step()
        merges.step()
    return model


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_modes_train_as_ray_heads_do(kind: str, reset: str) -> None:
    """Over 40 steps of Adam and 8 merges, or 100 and 20: merged weights, and heads' outputs in training, in ddp and in dmp."""
    lte = dataclasses.replace(LTE, reset=reset)
    if kind == "tied":
        lte = dataclasses.replace(lte, adapt=("linear",))
    base, heads = train_heads(kind, lte)
    x, _ = batch(kind, 0)
    expected = torch.cat([head(own) for head, own in zip(heads, x.chunk(HEADS), strict=True)])
    for mode in ("ddp", "dmp"):
        model = train_mode(kind, lte, mode)
        state = merged_state_dict(model)
        # 1e-9: float64 rounding, which 100 steps of Adam make grow; other arithmetic is off by 1e-3 and more.
        for name, value in base.items():
            assert_near(state[name], value, 1e-9)
        assert_near(model(x), expected, 1e-9)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("bias", ["replica", "frozen", "lora"])
@pytest.mark.parametrize(("mode", "chunk"), [("ddp", "layer"), ("ddp", "model"), ("dmp", "layer"), ("dmp", "model")])
def test_every_treatment_of_biases_and_both_ways_of_sharing(bias: str, mode: str, chunk: str) -> None:
    """Attention with replica, frozen and LoRA biases, its batch shared out by each layer or by the model."""
    lte = dataclasses.replace(LTE, lora_bias=bias)
    base, _ = train_heads("attention", lte)
    state = merged_state_dict(train_mode("attention", lte, mode, chunk))
    for name, value in base.items():
        assert_near(state[name], value, 1e-9)


def test_the_mean_loss_gives_each_head_its_share_of_the_gradient() -> None:
    """In ddp a head's gradient of the mean over the batch is 1/H of that of its own mean (DESIGN 3.9): SGD sees it."""
    model = prepare_model_for_lte(build("linear"), LTE, use_special_attention_scaling=False, seed=SEED)
    heads = [convert(build("linear"), LTE, seed=SEED, head=head) for head in range(HEADS)]
    x, target = batch("linear", 1)
    loss(model(x), target).backward()
    for index, (head, own, aim) in enumerate(zip(heads, x.chunk(HEADS), target.chunk(HEADS), strict=True)):
        loss(head.model(own), aim).backward()
        gradient = head.factors["0.weight.lora_B"].grad
        assert gradient is not None
        assert_near(model[0].lora_B_weight.grad[index, :, : gradient.shape[1]] * HEADS, gradient, 1e-14)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "layer-norm"])
def test_mhlora_is_lte_that_merges_at_every_step(kind: str) -> None:
    """The paper's equivalence: heads on the same data, merged after every step, SGD. Every head's gradient in ddp counts one
    H-th of a batch that holds the data H times, as mhlora's 1/H does.

    Reset-less LTE at merge_iter = 1 computes with W + s(BA - B'A') = W right after a merge, so its gradients are those at W,
    and so are mhlora's at W + (1/H) sum s B A: one and the same matrix.
    """
    lte = dataclasses.replace(LTE, lora_bias="frozen")

    def prepare(mode: str) -> nn.Module:
        return prepare_model_for_lte(build(kind), lte, mode=mode, use_special_attention_scaling=False, seed=SEED, strict=False)

    merging, joint = prepare("ddp"), prepare("mhlora")
    pairs = [(m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)) for m in (merging, joint)]
    for step in range(20):
        x, target = batch(kind, step)
        for model, optimizer in pairs:
            copies = HEADS if model is merging else 1
            optimizer.zero_grad()
            loss(model(x.repeat(copies, *[1] * (x.dim() - 1))), target.repeat(copies)).backward()
            optimizer.step()
        MergeCondition(merging).merge()
    merged, expected = merged_state_dict(merging), merged_state_dict(joint)
    start = build(kind).state_dict()
    for name, value in expected.items():
        assert_near(merged[name], value, 1e-12)  # 20 steps of SGD in float64
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)


def test_merged_weights_are_the_average_of_products() -> None:
    """W + (1/H) sum_h s_h B_h A_h after a first merge, written out densely, ranks and alphas differing by head."""
    model = prepare_model_for_lte(build("linear"), LTE, use_special_attention_scaling=False, seed=SEED)
    layer = model[0]
    with torch.no_grad():
        layer.lora_B_weight.copy_(torch.randn(layer.lora_B_weight.shape, generator=torch.Generator().manual_seed(0)))
        layer.lora_B_weight[1, :, 1] = 0  # head 1 has rank 1: the rest is padding
    expected = build("linear")[0].weight.detach()
    for head, s in enumerate((2.0, 3.0)):
        expected = expected + s * layer.lora_B_weight[head] @ layer.lora_A_weight[head] / HEADS
    layer.merge_parameters()
    assert_near(as_matrix(layer.specs[0], layer.weight.detach()), expected, 1e-14)
