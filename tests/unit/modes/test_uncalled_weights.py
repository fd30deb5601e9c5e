"""Weights that a model uses without calling their layer: the head's own, or an error, but never stale ones."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lte_ray import LTEConfig, LTEError, prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import (
    LTE,
    MODES,
    UNIFORM,
    ModelCase,
    assert_like_heads,
    loss,
    one_linear,
    perturb,
    prepare,
    train_heads,
    train_mode,
)
from tests.support.numerics import assert_near
from workers.gpt import GPT

LINEAR_ONLY = dataclasses.replace(LTE, adapt=("linear",))
WIDTH = 4


class Words(nn.Module):
    """Positions, tied logits, and a layer, each used by its weight (`direct`) or called."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct = direct
        self.tokens, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(5, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.logits = None if direct else nn.Linear(WIDTH, 7, bias=False)
        if self.logits is not None:
            self.logits.weight = self.tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.tokens(words)
        if self.logits is not None:
            x = torch.tanh(self.mid(x + self.positions(torch.arange(words.shape[1]))))
            return self.logits(self.mid(x))  # type: ignore[no-any-return]
        x = torch.tanh(self.mid(x + self.positions.weight[: words.shape[1]]))
        x = F.linear(x.to(self.mid.weight.dtype), self.mid.weight, self.mid.bias)
        return F.linear(x, self.tokens.weight)


CALLED = ModelCase(lambda: Words(direct=False), (3,), words=True)
DIRECT = ModelCase(lambda: Words(direct=True), (3,), words=True)


@pytest.mark.parametrize("lte", [LINEAR_ONLY, LTE], ids=["replicas", "adapted"])
def test_weights_used_without_a_call_train_with_chunk_model(lte: LTEConfig) -> None:
    """positions.weight[:t], mid.weight, and the tied tokens.weight are each head's own, as if these layers were called."""
    called_lte = lte if lte is LTE else dataclasses.replace(lte, exclude=("logits",))
    expected, x = train_heads(CALLED, called_lte), CALLED.batch(0)[0]
    for mode in ("ddp", "dmp"):
        model = train_mode(DIRECT, lte, mode, "model")
        assert_like_heads(model, expected, x)
        assert_near(model.eval()(x), evaluate_merged(model, x), 1e-13)


def evaluate_merged(model: nn.Module, x: Tensor) -> Tensor:
    """What the unconverted model computes with the merged weights."""
    original = DIRECT.build()
    original.load_state_dict(merged_state_dict(model))
    y: Tensor = original.eval()(x)
    return y


def test_weights_used_without_a_call_in_mhlora() -> None:
    """They hold the heads' sum, in training and in evaluation."""
    model = train_mode(DIRECT, LTE, "mhlora")
    x, _ = DIRECT.batch(0)
    assert_near(model(x), evaluate_merged(model, x), 1e-13)
    assert_near(model.eval()(x), evaluate_merged(model, x), 1e-13)


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize(
    ("lte", "named"),
    [(LINEAR_ONLY, ["tokens", "positions"]), (LINEAR_ONLY, []), (LTE, [])],
    ids=["replica-layers", "unmentioned", "adapted"],
)
def test_weights_used_without_a_call_are_an_error_with_chunk_layer(lte: LTEConfig, named: list[str], mode: str) -> None:
    """In training the first use raises, naming the parameter and chunk='model'. Evaluation works."""
    model = prepare(DIRECT, mode, lte, replica_layers=named)
    x, _ = DIRECT.batch(0)
    with pytest.raises(LTEError, match=r"positions\.weight is used .*chunk='model'"):
        model(x)
    assert_near(model.eval()(x), DIRECT.build()(x), 1e-14)
    assert isinstance(model.train().positions.weight * 2, Tensor)  # outside a forward pass it is an ordinary tensor


class Inspects(nn.Module):
    """Reads only type, device, shape, and size of its layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.linear, self.out):
            w = layer.weight
            x = x.to(w.device, w.dtype).view(-1, w.shape[1])
            assert (w.dim(), w.ndim, w.numel(), w.is_cuda, len(w), w.size(0)) == (2, 2, w.nelement(), False, len(w), w.shape[0])
            assert isinstance(w.detach(), Tensor)
            assert "..." not in repr(w)
        y: Tensor = self.out(self.linear(x))
        return y


@pytest.mark.parametrize(("mode", "chunk"), [("ddp", "layer"), ("dmp", "model"), ("mhlora", "layer")])
def test_weights_may_be_inspected(mode: str, chunk: str) -> None:
    """As transformers' models do to cast their inputs: a layer with LoRA, and a replica."""
    model = prepare_model_for_lte(Inspects(), UNIFORM, mode=mode, chunk=chunk, replica_layers=["out", "scale"])
    assert model(torch.ones(2, WIDTH)).shape == (2, 3)


class CallsPartOfReplica(nn.Module):
    """Calls a part of a layer instead of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Sequential(OrderedDict(linear=nn.Linear(WIDTH, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer.linear(self.first(x))
        return y


def test_parts_of_replica_layers_called_from_outside() -> None:
    """With chunk="layer" the merged part wouldn't train: an error that names it. With chunk="model" copies train."""
    x = torch.ones(2, WIDTH)
    model = prepare_model_for_lte(CallsPartOfReplica(), UNIFORM, replica_layers=["outer"])
    with pytest.raises(LTEError, match=r"outer\.linear, inside a replica layer, is used .*chunk='model'"):
        model(x)
    assert model.eval()(x).shape == (2, 3)
    model = prepare_model_for_lte(CallsPartOfReplica(), UNIFORM, replica_layers=["outer"], chunk="model")
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("length", [3, 4])
def test_positions_are_no_batch(length: int) -> None:
    """chunk="layer" refuses positions(arange(t)), whether t differs from the batch or happens to equal it."""
    for lte, named in ((LINEAR_ONLY, ["positions"]), (LTE, [])):
        model = prepare(CALLED, "ddp", lte, replica_layers=named)
        with pytest.raises(LTEError, match=r"positions got .*chunk='model'"):
            model(torch.zeros(4, length, dtype=torch.long))


@pytest.mark.parametrize(("mode", "lte"), [("ddp", LINEAR_ONLY), ("dmp", LTE)], ids=["ddp-replicas", "dmp-adapted"])
def test_the_gpt_worker_in_one_process(mode: str, lte: LTEConfig) -> None:
    """workers/gpt.py: chunk="layer" is one error; with chunk="model" every copy and factor trains, positions included."""
    gpt = GPT(width=8, depth=1, attention_heads=2, context=6)
    case = ModelCase(gpt.build_model, ())
    words = torch.randint(256, (4, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(LTEError, match=r"positions got .*chunk='model'"):
        prepare(case, mode, lte)(words)
    model = prepare(case, mode, lte, chunk="model")
    before = merged_state_dict(model)
    for _ in range(2):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        loss(model(words), torch.ones(4)).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        MergeCondition(model).merge()
    after = merged_state_dict(model)
    assert set(after) == set(gpt.build_model().state_dict())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


class Checkpointed(nn.Module):
    """Uses weights and a lone parameter without a call, in a last part that is checkpointed unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None, what: str) -> None:
        super().__init__()
        self.reentrant, self.what = reentrant, what
        self.tokens, self.mid, self.scale = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def last(self, x: Tensor) -> Tensor:
        if self.what == "scale":
            return torch.tanh(x * self.scale)
        return F.linear(torch.tanh(x), self.tokens.weight)

    def forward(self, words: Tensor) -> Tensor:
        x = self.mid(self.tokens(words) * self.scale)
        return self.last(x) if self.reentrant is None else checkpoint(self.last, x, use_reentrant=self.reentrant)


def gradients(mode: str, reentrant: bool | None, what: str = "tokens", lte: LTEConfig = LTE, **settings: Any) -> dict[str, Any]:
    case = ModelCase(lambda: Checkpointed(reentrant, what), ())
    model = perturb(prepare(case, mode, lte, **settings))
    model(torch.arange(12).view(4, 3) % 7).sin().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_uses_of_a_weight_in_mhlora(reentrant: bool) -> None:
    """What the backward pass recomputes has the heads' sum too: the same gradients as without a checkpoint."""
    expected, actual = gradients("mhlora", None), gradients("mhlora", reentrant)
    for name, gradient in expected.items():
        assert gradient.any()
        assert torch.equal(actual[name], gradient)


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize(("what", "reentrant"), [("adapted", True), ("adapted", False), ("replica", False), ("scale", True)])
def test_checkpointed_uses_of_a_weight_in_a_loop_are_an_error(mode: str, reentrant: bool, what: str) -> None:
    """In a backward pass no head is active: an error, not the merged weight's gradients."""
    lte = LTE if what == "adapted" else LINEAR_ONLY
    named = ["tokens"] if what == "replica" else []
    with pytest.raises(LTEError, match="would lose track of the head"):
        gradients(mode, reentrant, what, lte, chunk="model", replica_layers=named)


class Interrupted(nn.Module):
    """Ctrl-C in the middle of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "chunk"), [("ddp", "layer"), ("ddp", "model"), ("dmp", "model"), ("mhlora", "layer")])
def test_an_interrupt_in_a_forward_pass_leaves_nothing_behind(mode: str, chunk: str) -> None:
    """Afterwards weights are ordinary parameters, and this model and others can be merged and reset."""
    model = prepare_model_for_lte(Interrupted().double(), UNIFORM, mode=mode, chunk=chunk)
    others = [one_linear(m) for m in MODES]
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 5, dtype=torch.float64))
    assert type(model.linear.weight) is nn.Parameter
    assert torch.equal(model.linear.weight * 2, 2 * model.linear._parameters["weight"])
    for m in (model, *others):
        MergeCondition(m).merge()
        (m.linear if m is model else m[0]).reset_lora_parameters()
        merged_state_dict(m)
    assert others[0](torch.ones(4, 5, dtype=torch.float64)).shape == (4, 4)


def test_merges_inside_a_forward_pass_use_the_weight_itself() -> None:
    """A merge while the model runs gives what a merge before the call gives."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.merges = nn.Linear(5, 4), False

        def forward(self, x: Tensor) -> Tensor:
            if self.merges:
                MergeCondition(self).merge()
            return self.linear(x)  # type: ignore[no-any-return]

    x = torch.ones(4, 5, dtype=torch.float64)
    for mode in MODES:
        model, other = (perturb(prepare(ModelCase(Merging, (5,)), mode, UNIFORM)) for _ in range(2))
        MergeCondition(other).merge()
        model.merges = True
        assert torch.equal(model(x), other(x))
        assert torch.equal(model.linear.weight, other.linear.weight)


def test_a_prepared_model_inside_another() -> None:
    """After the inner model's call the outer one still runs: a weight that it uses without a call is an error."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.linear = [inner], nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x) @ self.linear.weight  # type: ignore[no-any-return]

    model = prepare_model_for_lte(Outer(one_linear("ddp")).double(), UNIFORM)
    with pytest.raises(LTEError, match=r"linear\.weight is used by another module"):
        model(torch.ones(2, 5, dtype=torch.float64))
