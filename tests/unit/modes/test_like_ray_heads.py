"""The in-process modes against layers of Ray heads: the same data, optimizer, and merges give the same model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lte_ray.adapters import convert
from lte_ray.config import LTEConfig
from lte_ray.merging.flat_buffer import as_matrix
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import (
    HEADS,
    LAYERS,
    LINEAR,
    LTE,
    SEED,
    assert_like_heads,
    loss,
    prepare,
    train_heads,
    train_mode,
)
from tests.support.numerics import assert_near


def config_of(kind: str, reset: str) -> LTEConfig:
    adapt = ("linear",) if kind == "tied" else LTE.adapt
    return dataclasses.replace(LTE, reset=reset, adapt=adapt)


RESETS = [
    *((kind, "none") for kind in LAYERS),
    *((kind, "B") for kind in ("linear", "conv1d", "embedding", "batch-norm", "tied")),
]


@pytest.mark.parametrize(("kind", "reset"), RESETS)
def test_modes_train_as_ray_heads_do(kind: str, reset: str) -> None:
    """Adam with two merges and steps after them: merged weights, and heads' outputs in training, in ddp and dmp."""
    case, lte = LAYERS[kind], config_of(kind, reset)
    expected = train_heads(case, lte)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(case, lte, mode), expected, case.batch(0)[0])


@pytest.mark.slow
@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_modes_train_as_ray_heads_do_for_long(kind: str, reset: str) -> None:
    """100 steps and 25 merges of every kind of layer with either reset."""
    case, lte = LAYERS[kind], config_of(kind, reset)
    expected = train_heads(case, lte, steps=100)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(case, lte, mode, steps=100), expected, case.batch(0)[0])


@pytest.mark.parametrize("bias", ["replica", "frozen", "lora"])
def test_every_treatment_of_biases_and_both_chunks(bias: str) -> None:
    """Attention with replica, frozen, and LoRA biases, whose batch each layer splits or the model does."""
    case, lte = LAYERS["attention"], dataclasses.replace(LTE, lora_bias=bias)
    expected = train_heads(case, lte)
    for mode, chunk in (("ddp", "layer"), ("ddp", "model"), ("dmp", "model")):
        assert_like_heads(train_mode(case, lte, mode, chunk), expected, case.batch(0)[0])


def test_the_mean_loss_gives_each_head_its_share_of_the_gradient() -> None:
    """In ddp a head's gradient of the mean over the batch is 1/H of that of its own mean, which SGD sees."""
    model = prepare(LINEAR, "ddp")
    heads = [convert(LINEAR.build(), LTE, seed=SEED, head=head) for head in range(HEADS)]
    x, target = LINEAR.batch(1)
    loss(model(x), target).backward()
    for index, (head, part, aim) in enumerate(zip(heads, x.chunk(HEADS), target.chunk(HEADS), strict=True)):
        loss(head.model(part), aim).backward()
        gradient = head.factors["0.weight.lora_B"].grad
        assert gradient is not None
        assert_near(model[0].lora_B_weight.grad[index, :, : gradient.shape[1]] * HEADS, gradient, 1e-14)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "layer-norm"])
def test_mhlora_is_lte_that_merges_at_every_step(kind: str) -> None:
    """The paper's equivalence: heads on the same data, merged after every SGD step.

    LTE without resets at merge_iter = 1 computes with W + s(BA - B'A') = W right after a merge, so its gradients are those at
    W. mhlora's are those at W + (1/H) sum s B A, which is the same matrix. A head's gradient in ddp counts 1/H of a batch that
    holds the data H times, as mhlora's 1/H does.
    """
    case, lte = LAYERS[kind], dataclasses.replace(LTE, lora_bias="frozen")
    merging, joint = prepare(case, "ddp", lte), prepare(case, "mhlora", lte)
    pairs = [(m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)) for m in (merging, joint)]
    for step in range(8):
        x, target = case.batch(step)
        for model, optimizer in pairs:
            copies = HEADS if model is merging else 1
            optimizer.zero_grad()
            loss(model(x.repeat(copies, *[1] * (x.dim() - 1))), target.repeat(copies)).backward()
            optimizer.step()
        MergeCondition(merging).merge()
    merged, expected = merged_state_dict(merging), merged_state_dict(joint)
    start = case.build().state_dict()
    for name, value in expected.items():
        assert_near(merged[name], value, 1e-12)  # a few steps of SGD in float64
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)


def test_merged_weights_are_the_average_of_products() -> None:
    """W + (1/H) sum_h s_h B_h A_h after a first merge, computed densely, with ranks and alphas that differ by head."""
    layer = prepare(LINEAR, "ddp")[0]
    with torch.no_grad():
        layer.lora_B_weight.copy_(torch.randn(layer.lora_B_weight.shape, generator=torch.Generator().manual_seed(0)))
        layer.lora_B_weight[1, :, 1] = 0  # padding: head 1 has rank 1
    expected = LINEAR.build()[0].weight.detach()
    for head, s in enumerate((2.0, 3.0)):
        expected = expected + s * layer.lora_B_weight[head] @ layer.lora_A_weight[head] / HEADS
    layer.merge_parameters()
    assert_near(as_matrix(layer.specs[0], layer.weight.detach()), expected, 1e-14)
