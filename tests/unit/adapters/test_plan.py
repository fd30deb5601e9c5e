"""Which parameters of any model get factors, and which train as replicas."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lte_ray.adapters import convert
from lte_ray.adapters.plan import make_plan
from lte_ray.config import LTEConfig
from tests.support.numerics import EPS64, assert_near
from tests.support.plan_cases import (
    ALL_KINDS,
    TiedModel,
    make_config,
    make_linear,
    make_plan_for,
    merged_model,
    model_of_every_kind,
    plan_names,
    random_tensor,
    randomize_factors,
    refusal_message,
)

# -- frozen others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "adapted", "replicas"),
    [
        ({}, ["0.weight", "2.weight"], []),
        ({"lora_bias": "lora"}, ["0.weight", "0.bias", "2.weight", "2.bias"], []),
        ({"exclude": ("2",)}, ["0.weight"], ["2.weight", "2.bias"]),
        ({"exclude": ("1",)}, ["0.weight", "2.weight"], ["1.weight", "1.bias"]),
        ({"layers": ("0: lora_bias=replica",)}, ["0.weight", "2.weight"], ["0.bias"]),
        ({"layers": ("1: adapt=false lr=0.5",)}, ["0.weight", "2.weight"], ["1.weight", "1.bias"]),
        ({"layers": ("@norm: adapt=false",)}, ["0.weight", "2.weight"], ["1.weight", "1.bias"]),
        ({"adapt": ("linear", "norm")}, ["0.weight", "1.weight", "2.weight"], []),
        ({"strict": True}, ["0.weight", "2.weight"], []),
        ({"adapt": (), "layers": ("2: adapt=true",)}, ["2.weight"], []),
    ],
)
def test_frozen_others_train_only_if_a_setting_names_them(
    settings: dict[str, Any], adapted: list[str], replicas: list[str]
) -> None:
    """As in PEFT: nothing but factors trains, apart from what --exclude or adapt=false names."""
    model = nn.Sequential(make_linear(), nn.LayerNorm(4), make_linear())
    assert plan_names(model, others="frozen", **settings) == (adapted, replicas)
    convert(model, make_config(others="frozen", **settings))
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= set(replicas)
    assert not {"0.bias", "1.bias"} & {n for n, p in model.named_parameters() if p.requires_grad} - {*adapted, *replicas}


def test_running_statistics_are_merged_though_others_are_frozen() -> None:
    """They aren't trained: the model changes them."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    assert plan_names(model, others="frozen") == (["0.weight"], ["1.running_mean", "1.running_var", "1.num_batches_tracked"])


def test_a_rule_for_what_is_frozen_is_an_error() -> None:
    """It would have no effect."""
    model = nn.Sequential(make_linear(), nn.LayerNorm(4))
    message = refusal_message(model, others="frozen", layers=("1: lr=0.5",))
    assert "sets lr for what has no LoRA (1, 1.bias, 1.weight) and is frozen (--others frozen)" in message
    assert "adapt=false to train it in full" in message


# -- biases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "adapted", "replicas"),
    [
        ("replica", ["0.weight"], ["0.bias", "1.weight", "1.bias"]),
        ("frozen", ["0.weight"], ["1.weight", "1.bias"]),
        ("lora", ["0.weight", "0.bias"], ["1.weight", "1.bias"]),
    ],
)
def test_biases_of_layers_with_factors_are_treated_as_lora_bias_says(
    bias: str, adapted: list[str], replicas: list[str]
) -> None:
    """Those of other layers (here a norm's) are replicas in any case; a frozen one doesn't train."""
    model = nn.Sequential(make_linear(), nn.LayerNorm(4))
    assert plan_names(model, lora_bias=bias) == (adapted, replicas)
    convert(model, make_config(lora_bias=bias))
    assert model[0].bias.requires_grad == (bias != "frozen")
    assert model[1].bias.requires_grad


def test_a_factored_bias_has_rank_one_and_the_layers_scaling() -> None:
    """b + s B A with B (out x 1) and A (1 x 1): in the plan a vector of d elements is a matrix d x 1."""
    plan = make_plan_for(make_linear(), lora_bias="lora", lora_r=4, lora_alpha=6.0)
    weight, bias = plan.adapted
    assert (weight.rank, weight.scaling) == (4, 1.5)
    assert (bias.name, bias.rank, bias.scaling, bias.matrix) == ("bias", 1, 1.5, (4, 1))


def test_the_bias_of_an_excluded_layer_is_a_replica_whatever_lora_bias_says() -> None:
    """lora_bias applies only to layers with factors."""
    model = nn.Sequential(make_linear(), make_linear())
    for bias in ("frozen", "lora"):
        assert plan_names(model, lora_bias=bias, exclude=("1",))[1] == ["1.weight", "1.bias"]


def test_rules_choose_the_bias_layer_by_layer() -> None:
    """One layer's is frozen, one's has a factor, the rest are replicas."""
    model = nn.Sequential(make_linear(), make_linear(), make_linear())
    adapted, replicas = plan_names(model, layers=("0: lora_bias=frozen", "1: lora_bias=lora"))
    assert (adapted, replicas) == (["0.weight", "1.weight", "1.bias", "2.weight"], ["2.bias"])


def test_a_bias_shared_by_layers_of_different_treatment_is_an_error() -> None:
    """One layer can't freeze what another one trains."""
    model = nn.Sequential(make_linear(), make_linear())
    model[1].bias = model[0].bias
    assert plan_names(model)[1] == ["0.bias"]
    assert "0 and 1 share the parameter 0.bias" in refusal_message(model, layers=("1: lora_bias=frozen",))
    assert plan_names(model, layers=("0.bias: lora_bias=frozen",))[1] == []


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_adapt_names_the_kinds_that_get_factors(kind: str) -> None:
    """Each kind by itself; all others are replicas. A rule for the kind does the same, and adapt=false reverts it."""
    adapted, replicas = plan_names(model_of_every_kind(), adapt=(kind,))
    assert adapted
    assert all(name.startswith(kind) for name in adapted)
    weights = {n for n, _ in model_of_every_kind().named_parameters() if n.endswith("weight")}
    assert weights <= {*adapted, *replicas}
    assert plan_names(model_of_every_kind(), adapt=(), layers=(f"@{kind}: adapt=true",)) == (adapted, replicas)
    others = [name for name in weights if not name.startswith(kind)]
    assert set(plan_names(model_of_every_kind(), adapt=ALL_KINDS, layers=(f"@{kind}: adapt=false",))[0]) == set(others)


def test_a_norms_weight_is_a_vector_times_a_scalar() -> None:
    """Its rank is 1, whatever lora_r is, and no rank is too high for it."""
    plan = make_plan_for(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), adapt=("norm",), lora_r=64)
    assert [(a.name, a.rank, a.matrix) for a in plan.adapted] == [("0.weight", 1, (4, 1)), ("1.weight", 1, (4, 1))]


def test_subclasses_and_other_layers_are_replicas() -> None:
    """A subclass may compute something else; recurrent, bilinear and transposed layers have no factors; all still train."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleList(
        [make_linear(), Own(4, 4), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4), nn.ConvTranspose1d(4, 4, 3), nn.PReLU()]
    )
    adapted, replicas = plan_names(model, adapt=ALL_KINDS)
    assert adapted == ["0.weight"]
    assert set(replicas) == {name for name, _ in model.named_parameters()} - {"0.weight"}


@pytest.mark.parametrize(
    ("conv", "largest"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), 6),  # depthwise: 6 x 9
        (nn.Conv2d(6, 12, 3, groups=6), 9),  # 12 x 9
        (nn.Conv2d(6, 4, 3, groups=2), 4),  # 4 x 27
        (nn.Conv1d(2, 8, 1), 2),
        (nn.Conv3d(4, 32, 2, groups=2), 16),  # 32 x 16
    ],
)
def test_a_convolutions_rank_is_bounded_by_out_and_in_over_groups_times_kernel(conv: nn.Module, largest: int) -> None:
    """A higher one is reduced to the largest useful rank, for this layer only; its scaling remains that of the others."""
    model = nn.ModuleDict({"conv": conv, "rest": nn.Linear(99, 99)})
    for asked in (1, largest, largest + 1, 99):
        plan = make_plan(model, LTEConfig(lora_r=asked, lora_alpha=8.0))
        assert [a.rank for a in plan.adapted] == [min(asked, largest), asked]
        assert [a.scaling for a in plan.adapted] == [8.0 / asked] * 2


@pytest.mark.parametrize(
    "conv", [nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ConvTranspose3d(4, 4, 2)]
)
def test_a_transposed_convolution_trains_as_a_replica(conv: nn.Module) -> None:
    """It computes as before, and gets gradients."""
    model = nn.ModuleDict({"conv": conv, "linear": make_linear()}).double()
    x = random_tensor(2, 4, *[3] * (conv.weight.ndim - 2))
    expected = model["conv"](x)
    converted = convert(model, make_config())
    assert [r.name for r in converted.plan.replicas] == ["conv.weight", "conv.bias", "linear.bias"]
    found = model["conv"](x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert conv.weight.grad is not None


def parametrized(kind: str) -> nn.Module:
    layer = make_linear()
    if kind == "weight_norm":
        return parametrizations.weight_norm(layer)
    if kind == "spectral_norm":
        return parametrizations.spectral_norm(layer)
    if kind == "orthogonal":
        return parametrizations.orthogonal(layer)
    if kind == "own":
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
        return layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones, that programs still use
        return getattr(torch.nn.utils, kind.removeprefix("old_"))(layer)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "own", "old_weight_norm", "old_spectral_norm"])
def test_parametrized_layers_train_as_replicas(kind: str) -> None:
    """The parameters behind their weight train; outputs are the same as before, and each replica gets a gradient."""
    model = nn.Sequential(make_linear(), parametrized(kind)).double().eval()  # spectral norm iterates in training
    x = random_tensor(2, 4)
    expected = model(x)
    converted = convert(model, make_config())
    assert [a.name for a in converted.plan.adapted] == ["0.weight"]
    assert torch.equal(converted.model(x), expected)
    converted.model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.weight"} | {r.name for r in converted.plan.replicas}
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained - {"0.weight"})


def test_pruned_layers_keep_their_masks() -> None:
    """torch's pruning makes the weight from weight_orig and a mask before each call: a replica."""
    model = nn.Sequential(make_linear(), prune.l1_unstructured(make_linear(), "weight", 0.5))
    x = random_tensor(2, 4)
    expected = model(x)
    converted = convert(model, make_config())
    assert "1.weight_orig" in [r.name for r in converted.plan.replicas]
    assert torch.equal(converted.model(x), expected)


def test_a_layer_called_several_times_is_adapted_once() -> None:
    """Gradients of all calls add up in one pair of factors, as they would in the dense weight."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = make_linear()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return x

    original = Recurrent()
    converted = convert(copy.deepcopy(original), make_config())
    randomize_factors(converted)
    dense = merged_model(original, converted)
    x = random_tensor(5, 4)
    assert_near(converted.model(x), dense(x), 50 * EPS64)
    for model in (converted.model, dense):
        model(x).square().sum().backward()
    spec = converted.plan.adapted[0]
    a, b, g = converted.factors[spec.a_name], converted.factors[spec.b_name], dense.step.weight.grad
    assert_near(a.grad, spec.scaling * b.T @ g, 200 * EPS64)
    assert_near(b.grad, spec.scaling * g @ a.T, 200 * EPS64)


# -- shared weights ----------------------------------------------------------------------------------------------------


def test_a_tied_weight_is_adapted_where_both_kinds_are() -> None:
    """Else it is a replica. Adapted, it has one pair of factors for both layers."""
    assert plan_names(TiedModel()) == (["up.weight"], ["words.weight", "up.bias"])
    original = TiedModel().double()
    converted = convert(copy.deepcopy(original), make_config(adapt=("linear", "embedding")))
    assert [a.name for a in converted.plan.adapted] == ["words.weight", "up.weight"]
    model = converted.model
    assert model.words.lte_factors is model.out.lte_factors
    assert model.words.weight is model.out.weight
    randomize_factors(converted)
    x = torch.tensor([[0, 6, 6]])
    assert_near(model(x), merged_model(original, converted)(x), 200 * EPS64)
    model(x).square().sum().backward()
    assert all(factor.grad is not None for factor in converted.factors.values())


def test_rules_that_contradict_each_other_on_a_shared_weight_are_an_error() -> None:
    """The error names the layers and the setting; equal settings are accepted, and so are those irrelevant for a replica."""
    both = ("linear", "embedding")
    for rule, differing in (("lora_r=1", "rank, scaling"), ("lr=0.5", "lr"), ("base_dtype=int8", "base_dtype")):
        message = refusal_message(TiedModel(), adapt=both, layers=(f"out: {rule}",))
        assert "words and out share the parameter words.weight" in message
        assert f"({differing})" in message
        spec = make_plan_for(TiedModel(), adapt=both, layers=(f"out: {rule}", f"words: {rule}")).adapted[0]
        for name in ("words.weight", "words"):  # which is the parameter's name, and what it lies below
            assert spec == make_plan_for(TiedModel(), adapt=both, layers=(f"{name}: {rule}",)).adapted[0]
    assert plan_names(TiedModel(), layers=("@linear: lora_r=1 base_dtype=int8",)) == plan_names(TiedModel())
    for rule in ("out: lr=0.5", "@embedding: lr=0.5", "@linear: lr=0.5"):
        assert "(lr)" in refusal_message(TiedModel(), layers=(rule,))
    assert make_plan_for(TiedModel(), layers=("words: lr=0.5",)).replicas[0].lr == 0.5


def test_a_weight_tied_to_its_transpose_kind_is_a_replica() -> None:
    """transformers' Conv1D stores in x out, nn.Linear out x in: one pair of factors can't serve both."""
    transformers_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"a": transformers_utils.Conv1D(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    adapted, replicas = plan_names(model)
    assert adapted == ["c.weight"]
    assert "a.weight" in replicas
