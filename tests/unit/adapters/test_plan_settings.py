"""Plans and settings: --strict, rules, per-head values, and models or settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lte_ray.adapters import LTELayer, convert
from lte_ray.adapters.plan import make_plan, make_plans
from lte_ray.config import LTEConfig
from lte_ray.errors import WorkerError
from tests.support.plan_cases import (
    make_config,
    make_linear,
    make_plan_for,
    plan_names,
    randomize_factors,
    refusal_message,
)

# -- strict ------------------------------------------------------------------------------------------------------------


def leftovers() -> nn.Module:
    model = nn.ModuleDict(
        {"words": nn.Embedding(7, 4), "body": make_linear(), "norm": nn.LayerNorm(4), "odd": nn.Bilinear(4, 4, 4)}
    )
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    return model


def test_strict_names_every_parameter_about_which_nothing_was_said() -> None:
    """Norms and biases of layers with LoRA are known replicas; the rest is listed, with what to do about it."""
    message = refusal_message(leftovers(), strict=True)
    assert "4 parameter(s) have no LoRA and would train as replicas: scale, words.weight, odd.weight, odd.bias." in message
    for advice in ("--exclude", "--adapt", "requires_grad_(False)", "leave --strict out"):
        assert advice in message


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude": ("scale", "words", "odd")},
        {"exclude": ("scale", "words.weight", "odd.*")},
        {"exclude": ("scale", "odd"), "adapt": ("linear", "embedding")},
        {"layers": ("scale: adapt=false", "words: adapt=false", "odd: adapt=false lr=0.1")},
        {"exclude": ("scale", "odd"), "layers": ("@embedding: adapt=true",)},
        {"exclude": ("*",), "layers": (), "fails": "nothing to adapt"},
    ],
)
def test_strict_is_content_when_each_parameter_was_spoken_of(settings: dict[str, Any]) -> None:
    """By --exclude (lone parameters too), by a rule with adapt=false, or by adapting its kind."""
    fails = settings.pop("fails", None)
    if fails:
        assert fails in refusal_message(leftovers(), WorkerError, strict=True, **settings)
        return
    assert plan_names(leftovers(), strict=True, **settings) == plan_names(leftovers(), **settings)


def test_strict_is_content_with_frozen_parameters() -> None:
    """A frozen parameter is never left over."""
    model = leftovers()
    for name in ("words", "odd"):
        model[name].requires_grad_(False)
    assert refusal_message(model, strict=True).count("scale") == 1
    model.scale.requires_grad_(False)
    assert plan_names(model, strict=True)[0] == ["body.weight"]


def test_strict_names_every_parameter() -> None:
    """However many it names."""
    model = nn.ModuleDict({"body": make_linear(), "odd": nn.ModuleList([nn.Bilinear(4, 4, 4) for _ in range(9)])})
    message = refusal_message(model, strict=True)
    assert "18 parameter(s)" in message
    assert message.count("odd.") == 18


# -- learning rates, formats, ranks by layer ---------------------------------------------------------------------------


def test_learning_rate_multipliers_reach_weights_biases_and_lone_parameters() -> None:
    """The last rule that matches the layer, or the parameter itself, applies."""
    model = leftovers()
    rules = ("*: lr=0.5", "body: lr=2", "scale: lr=0.1", "odd.bias: lr=0", "@norm: lr=3")
    plan = make_plan_for(model, layers=rules, lora_bias="lora")
    assert {a.name: a.lr for a in plan.adapted} == {"body.weight": 2.0, "body.bias": 2.0}
    assert {r.name: r.lr for r in plan.replicas} == {
        "scale": 0.1,
        "words.weight": 0.5,
        "norm.weight": 3.0,
        "norm.bias": 3.0,
        "odd.weight": 0.5,
        "odd.bias": 0.0,
    }


def test_the_format_of_main_weights_is_chosen_layer_by_layer() -> None:
    """base_dtype for all, another for some; vectors stay float32 in the heads."""
    model = nn.Sequential(make_linear(), make_linear(), nn.LayerNorm(4))
    settings = {"base_dtype": "int8", "layers": ("1: base_dtype=bf16",), "adapt": ("linear", "norm")}
    plan = make_plan_for(model, **settings)
    assert [(a.name, a.base_dtype) for a in plan.adapted][:2] == [("0.weight", "int8"), ("1.weight", "bf16")]
    converted = convert(model, make_config(**settings))
    assert [type(converted.main_weights[f"{i}.weight"].stored).__name__ for i in range(3)] == [
        "QuantizedWeight",
        "QuantizedWeight",
        "Tensor",
    ]


def test_heads_plans_differ_in_rank_and_scaling_only() -> None:
    """Per-head values, for all and in rules; without any, all heads have one plan."""
    model = nn.Sequential(make_linear(), make_linear())
    lte = LTEConfig(num_heads=3, lora_r=(1, 2, 3), lora_alpha=6.0, layers=("1: lora_alpha=1,2,4",))
    plans = make_plans(model, lte)
    assert [[a.rank for a in plan.adapted] for plan in plans] == [[1, 1], [2, 2], [3, 3]]
    assert [[a.scaling for a in plan.adapted] for plan in plans] == [[6.0, 1.0], [3.0, 1.0], [2.0, 4 / 3]]
    assert len({plan.base for plan in plans}) == 1
    assert len({plan.replicas for plan in plans}) == 1
    assert len(set(make_plans(model, LTEConfig(num_heads=3, lora_r=2, layers=("0: lora_r=1",))))) == 1
    cut = make_plans(model, LTEConfig(num_heads=2, lora_r=(1, 9)))
    assert [[a.rank for a in plan.adapted] for plan in cut] == [[1, 1], [4, 4]]  # 4 x 4 layers take no more


def test_adapting_what_cannot_have_factors_is_an_error() -> None:
    """A rule with adapt=true for a layer of no kind; one that matches others too is fine."""
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 3), "body": make_linear()})
    message = refusal_message(model, layers=("up: adapt=true",))
    assert "'up: adapt=true'" in message
    assert "can't have factors" in message
    for pattern in ("*", "body", "body.weight", "body*"):
        assert plan_names(model, adapt=(), layers=(f"{pattern}: adapt=true",))[0] == ["body.weight"]


def test_a_rule_for_a_kind_that_the_model_has_not_is_an_error() -> None:
    """The error names the model's kinds."""
    assert "none of kind conv. It has: linear, norm." in refusal_message(
        nn.Sequential(make_linear(), nn.LayerNorm(4)), layers=("@conv: lr=2",)
    )


# -- what can't be merged ----------------------------------------------------------------------------------------------


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    model = nn.Sequential(make_linear())
    model.register_parameter("odd", parameter)
    return model


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (nn.Parameter(torch.eye(3).to_sparse()), "Parameter odd is sparse"),
        (nn.Parameter(torch.zeros(3, dtype=torch.complex128)), "real and imaginary parts"),
        (nn.UninitializedParameter(), "Parameter odd has no shape yet"),
    ],
)
def test_a_parameter_that_cannot_be_merged_is_refused_by_name(parameter: nn.Parameter, says: str) -> None:
    """If it trains; a frozen one is ignored."""
    assert says in refusal_message(with_parameter(parameter), WorkerError)
    parameter.requires_grad = False
    assert plan_names(with_parameter(parameter))[0] == ["0.weight"]


def test_integers_that_do_not_train_are_left_alone() -> None:
    """As in modules that are quantized already."""
    model = with_parameter(nn.Parameter(torch.arange(3), requires_grad=False))
    assert plan_names(model) == (["0.weight"], ["0.bias"])
    assert torch.equal(convert(model, make_config()).model.odd, torch.arange(3))


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d(affine=False)]
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_is_refused_by_name(lazy: nn.Module) -> None:
    """Parameters and statistics that have no shape yet."""
    assert "1.weight has no shape yet" in refusal_message(nn.Sequential(make_linear(), lazy), WorkerError).replace(
        "running_mean", "weight"
    )


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_of_a_replica_are_refused_before_training(kind: type[nn.Module]) -> None:
    """AdamW fails on them in the first step. The error says what to change; an adapted embedding has dense factors."""
    model = nn.ModuleDict({"words": kind(7, 4, sparse=True), "body": make_linear()}).double()
    message = refusal_message(model, WorkerError)
    assert "words.weight" in message
    assert "sparse=False" in message
    assert ("embedding" in message) == (kind is nn.Embedding)
    model["words"].weight.requires_grad_(False)
    assert plan_names(model)[0] == ["body.weight"]
    model["words"].weight.requires_grad_(True)
    if kind is nn.Embedding:
        converted = convert(model, make_config(adapt=("linear", "embedding")))
        randomize_factors(converted)
        model["words"](torch.tensor([1, 2])).sum().backward()
        assert all(not converted.factors[f"words.weight.lora_{f}"].grad.is_sparse for f in "AB")


def test_a_scalar_and_an_empty_parameter_are_replicas() -> None:
    """A parameter without dimensions, and one without elements."""
    for parameter in (nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0))):
        assert plan_names(with_parameter(parameter))[1] == ["odd", "0.bias"]


# -- models that hold odd modules --------------------------------------------------------------------------------------


def test_a_model_that_was_converted_already_has_nothing_to_adapt() -> None:
    """The error tells a worker that converts its model itself; nothing is adapted twice."""
    model = convert(nn.Sequential(make_linear()), make_config()).model
    assert isinstance(model[0], LTELayer)
    assert "nothing to adapt" in refusal_message(model, WorkerError)


def test_the_shapes_of_names_that_patterns_match() -> None:
    """A pattern names a shared layer by any of its names, and lone parameters; similar names are suggested."""
    model = nn.ModuleDict({"a": make_linear(), "b": nn.Sequential(make_linear())})
    model["c"] = model["a"]
    assert plan_names(model, exclude=("c",))[0] == ["b.0.weight"]
    assert plan_names(model, exclude=("a.bias",)) == plan_names(model)
    assert "Did you mean b.0?" in refusal_message(model, layers=("b.1: lr=2",))
    assert "matches no layer" in refusal_message(model, layers=("a.weights: lr=2",))


def test_a_rule_that_sets_a_rank_where_there_is_no_lora_is_an_error() -> None:
    """Otherwise a user might think that a layer is adapted or quantized, though it trains as a replica."""
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "body": make_linear()})
    for text in ("words: lora_r=2", "words: base_dtype=bf16", "norm: lora_bias=frozen", "@embedding: lora_alpha=3"):
        message = refusal_message(model, layers=(text,))
        assert f"--layers {text!r} sets " in message
        assert "has no LoRA" in message
    for text in ("words: lora_r=2 adapt=true", "words: lr=0.5", "*: lora_r=2", "words: adapt=false lora_r=2"):
        make_plan(model, LTEConfig(lora_r=2, layers=(text,)))
