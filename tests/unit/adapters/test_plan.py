"""Which parameters of any model get factors, which train as replicas, and which are refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lte_ray.adapters import Converted, LTELayer, convert
from lte_ray.adapters.plan import make_plan, make_plans
from lte_ray.config import LTEConfig
from lte_ray.errors import ConfigError, UserError, WorkerError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import as_stored
from tests.support.numerics import EPS64, assert_near

EVERYTHING = ("linear", "attention", "conv", "embedding", "norm")


def config(**settings: Any) -> LTEConfig:
    return LTEConfig(**({"num_heads": 1, "lora_r": 2, "lora_alpha": 3.0} | settings))


def plan_of(model: nn.Module, **settings: Any) -> Plan:
    return make_plan(model, config(**settings))


def names(model: nn.Module, **settings: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the adapted parameters and of the replicas."""
    plan = plan_of(model, **settings)
    return [a.name for a in plan.adapted], [r.name for r in plan.replicas]


def refusal(model: nn.Module, kind: type[UserError] = ConfigError, **settings: Any) -> str:
    """Returns the message with which the model is refused."""
    with pytest.raises(kind) as raised:
        plan_of(model, **settings)
    return str(raised.value)


def linear(**options: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4, **options).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(converted: Converted) -> None:
    with torch.no_grad():
        for i, factor in enumerate(converted.factors.values()):
            factor.copy_(draw(*factor.shape, seed=i))


def merged(original: nn.Module, converted: Converted) -> nn.Module:
    """Returns a copy of the unconverted model with W + s B A instead of W."""
    model = copy.deepcopy(original)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in converted.plan.adapted:
            product = converted.factors[spec.b_name] @ converted.factors[spec.a_name]
            parameters[spec.name] += as_stored(spec, spec.scaling * product)
    return model


class Tied(nn.Module):
    """An embedding that shares its weight with the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.words(x))))


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
    model = nn.Sequential(linear(), nn.LayerNorm(4))
    assert names(model, lora_bias=bias) == (adapted, replicas)
    convert(model, config(lora_bias=bias))
    assert model[0].bias.requires_grad == (bias == "replica")
    assert model[1].bias.requires_grad


def test_a_factored_bias_has_rank_one_and_the_layers_scaling() -> None:
    """b + s B A with B (out x 1) and A (1 x 1): in the plan a vector of d elements is a matrix d x 1."""
    plan = plan_of(linear(), lora_bias="lora", lora_r=4, lora_alpha=6.0)
    weight, bias = plan.adapted
    assert (weight.rank, weight.scaling) == (4, 1.5)
    assert (bias.name, bias.rank, bias.scaling, bias.matrix) == ("bias", 1, 1.5, (4, 1))


def test_the_bias_of_an_excluded_layer_is_a_replica_whatever_lora_bias_says() -> None:
    """lora_bias applies only to layers with factors."""
    model = nn.Sequential(linear(), linear())
    for bias in ("frozen", "lora"):
        assert names(model, lora_bias=bias, exclude=("1",))[1] == ["1.weight", "1.bias"]


def test_rules_choose_the_bias_layer_by_layer() -> None:
    """One layer's is frozen, one's has a factor, the rest are replicas."""
    model = nn.Sequential(linear(), linear(), linear())
    adapted, replicas = names(model, layers=("0: lora_bias=frozen", "1: lora_bias=lora"))
    assert (adapted, replicas) == (["0.weight", "1.weight", "1.bias", "2.weight"], ["2.bias"])


def test_a_bias_shared_by_layers_of_different_treatment_is_an_error() -> None:
    """One layer can't freeze what another one trains."""
    model = nn.Sequential(linear(), linear())
    model[1].bias = model[0].bias
    assert names(model)[1] == ["0.bias"]
    assert "0 and 1 share the parameter 0.bias" in refusal(model, layers=("1: lora_bias=frozen",))
    assert names(model, layers=("0.bias: lora_bias=frozen",))[1] == []


# -- kinds -------------------------------------------------------------------------------------------------------------


def every_kind() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv2d(4, 4, 3),
            "embedding": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
        }
    )


@pytest.mark.parametrize("kind", EVERYTHING)
def test_adapt_names_the_kinds_that_get_factors(kind: str) -> None:
    """Each kind by itself; all others are replicas. A rule for the kind does the same, and adapt=false reverts it."""
    adapted, replicas = names(every_kind(), adapt=(kind,))
    assert adapted
    assert all(name.startswith(kind) for name in adapted)
    weights = {n for n, _ in every_kind().named_parameters() if n.endswith("weight")}
    assert weights <= {*adapted, *replicas}
    assert names(every_kind(), adapt=(), layers=(f"@{kind}: adapt=true",)) == (adapted, replicas)
    others = [name for name in weights if not name.startswith(kind)]
    assert set(names(every_kind(), adapt=EVERYTHING, layers=(f"@{kind}: adapt=false",))[0]) == set(others)


def test_a_norms_weight_is_a_vector_times_a_scalar() -> None:
    """Its rank is 1, whatever lora_r is, and no rank is too high for it."""
    plan = plan_of(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), adapt=("norm",), lora_r=64)
    assert [(a.name, a.rank, a.matrix) for a in plan.adapted] == [("0.weight", 1, (4, 1)), ("1.weight", 1, (4, 1))]


def test_subclasses_and_other_layers_are_replicas() -> None:
    """A subclass may compute something else; recurrent, bilinear and transposed layers have no factors; all still train."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleList([linear(), Own(4, 4), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4), nn.ConvTranspose1d(4, 4, 3), nn.PReLU()])
    adapted, replicas = names(model, adapt=EVERYTHING)
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
    model = nn.ModuleDict({"conv": conv, "linear": linear()}).double()
    x = draw(2, 4, *[3] * (conv.weight.ndim - 2))
    expected = model["conv"](x)
    converted = convert(model, config())
    assert [r.name for r in converted.plan.replicas] == ["conv.weight", "conv.bias", "linear.bias"]
    found = model["conv"](x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert conv.weight.grad is not None


def parametrized(kind: str) -> nn.Module:
    layer = linear()
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
    model = nn.Sequential(linear(), parametrized(kind)).double().eval()  # spectral norm iterates in training
    x = draw(2, 4)
    expected = model(x)
    converted = convert(model, config())
    assert [a.name for a in converted.plan.adapted] == ["0.weight"]
    assert torch.equal(converted.model(x), expected)
    converted.model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {r.name for r in converted.plan.replicas}
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained)


def test_pruned_layers_keep_their_masks() -> None:
    """torch's pruning makes the weight from weight_orig and a mask before each call: a replica."""
    model = nn.Sequential(linear(), prune.l1_unstructured(linear(), "weight", 0.5))
    x = draw(2, 4)
    expected = model(x)
    converted = convert(model, config())
    assert "1.weight_orig" in [r.name for r in converted.plan.replicas]
    assert torch.equal(converted.model(x), expected)


def test_a_layer_called_several_times_is_adapted_once() -> None:
    """Gradients of all calls add up in one pair of factors, as they would in the dense weight."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = linear()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return x

    original = Recurrent()
    converted = convert(copy.deepcopy(original), config())
    randomise(converted)
    dense = merged(original, converted)
    x = draw(5, 4)
    assert_near(converted.model(x), dense(x), 50 * EPS64)
    for model in (converted.model, dense):
        model(x).square().sum().backward()
    spec = converted.plan.adapted[0]
    a, b, g = converted.factors[spec.a_name], converted.factors[spec.b_name], dense.step.weight.grad
    assert_near(a.grad, spec.scaling * b.T @ g, 200 * EPS64)
    assert_near(b.grad, spec.scaling * g @ a.T, 200 * EPS64)


# -- attention ---------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Cross attention at two places, which may be one module."""

    def __init__(self, shared: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.second = self.first if shared else nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor, values: Tensor) -> Tensor:
        x = x + self.first(x, memory, values)[0]
        return x + self.second(query=x, key=memory, value=values, need_weights=False)[0]


OPTIONS: list[dict[str, Any]] = [{}, {"kdim": 8, "vdim": 8}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_computes_with_factors_in_each_projection(options: dict[str, Any], shared: bool) -> None:
    """Packed and separate projections; outputs are those of the merged weights, gradients reach every factor and replica."""
    original = Attends(shared, **options).double()
    x, memory = draw(2, 3, 8, seed=1), draw(2, 4, options.get("kdim", 8), seed=2)
    values = draw(2, 4, options.get("vdim", 8), seed=3)
    converted = convert(copy.deepcopy(original), config())
    assert (converted.model.first is converted.model.second) == shared
    each = 4 if "kdim" in options and options["kdim"] != 8 else 2
    assert len(converted.plan.adapted) == each * (1 if shared else 2)
    # Another order of the same sums.
    assert_near(converted.model(x, memory, values), original(x, memory, values), 50 * EPS64)
    randomise(converted)
    found = converted.model(x, memory, values)
    assert_near(found, merged(original, converted)(x, memory, values), 1000 * EPS64)
    found.square().sum().backward()
    assert all(f.grad is not None for f in converted.factors.values())
    assert all(converted.parameters[r.name].grad is not None for r in converted.plan.replicas)


def test_attention_can_be_the_whole_model() -> None:
    """The converted model is another module, under the same names."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2).double()
    converted = convert(copy.deepcopy(original), config())
    assert [a.name for a in converted.plan.adapted] == ["in_proj_weight", "out_proj.weight"]
    assert [r.name for r in converted.plan.replicas] == ["in_proj_bias", "out_proj.bias"]
    randomise(converted)
    x = draw(3, 2, 8)
    assert_near(converted.model(x, x, x)[0], merged(original, converted)(x, x, x)[0], 1000 * EPS64)


@pytest.mark.parametrize(
    ("exclude", "adapted"),
    [
        (("first.out_proj",), ["first.in_proj_weight", "second.in_proj_weight", "second.out_proj.weight"]),
        (("first.in_proj_weight",), ["first.out_proj.weight", "second.in_proj_weight", "second.out_proj.weight"]),
        (("first",), ["second.in_proj_weight", "second.out_proj.weight"]),
        (("*.out_proj",), ["first.in_proj_weight", "second.in_proj_weight"]),
    ],
)
def test_parts_of_attention_can_be_excluded(exclude: tuple[str, ...], adapted: list[str]) -> None:
    """The rest is adapted; what is excluded trains as a replica, bias and all, and gets gradients."""
    original = Attends().double()
    converted = convert(copy.deepcopy(original), config(exclude=exclude))
    assert [a.name for a in converted.plan.adapted] == adapted
    randomise(converted)
    x = draw(2, 3, 8)
    found = converted.model(x, x, x)
    assert_near(found, merged(original, converted)(x, x, x), 1000 * EPS64)
    found.square().sum().backward()
    assert all(converted.parameters[r.name].grad is not None for r in converted.plan.replicas)


@pytest.mark.parametrize(("bias", "left"), [("frozen", []), ("replica", ["in_proj_bias", "out_proj.bias"])])
def test_biases_of_attention_are_frozen_too(bias: str, left: list[str]) -> None:
    """Also those that are packed though the projections aren't (kdim, vdim)."""
    for options in ({}, {"kdim": 3, "vdim": 5}):
        model = nn.MultiheadAttention(8, 2, **options)
        assert names(model, lora_bias=bias)[1] == left
        assert convert(model, config(lora_bias=bias)).parameters["in_proj_bias"].requires_grad == (bias == "replica")


def test_packed_biases_of_separate_projections_are_replicas_where_biases_have_factors() -> None:
    """They are added after the projections, so they can't have a factor; that of out_proj has one."""
    adapted, replicas = names(nn.MultiheadAttention(8, 2, kdim=3, vdim=5), lora_bias="lora")
    assert adapted[-1] == "out_proj.bias"
    assert replicas == ["in_proj_bias"]


def test_hooks_of_an_attention_see_its_calls() -> None:
    """A program that records attention maps with a forward hook still works."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    maps: list[Tensor] = []
    model["attention"].register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    model["attention"].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "average_attn_weights": False}), with_kwargs=True
    )
    x = draw(2, 3, 8)
    model["attention"](x, x, x)
    convert(model, config())
    model["attention"](x, x, x)
    assert [m.shape for m in maps] == [(2, 2, 3, 3)] * 2
    assert_near(maps[1], maps[0], 50 * EPS64)


# -- shared weights ----------------------------------------------------------------------------------------------------


def test_a_tied_weight_is_adapted_where_both_kinds_are() -> None:
    """Else it is a replica. Adapted, it has one pair of factors for both layers."""
    assert names(Tied()) == (["up.weight"], ["words.weight", "up.bias"])
    original = Tied().double()
    converted = convert(copy.deepcopy(original), config(adapt=("linear", "embedding")))
    assert [a.name for a in converted.plan.adapted] == ["words.weight", "up.weight"]
    model = converted.model
    assert model.words.lora is model.out.lora
    assert model.words.weight is model.out.weight
    randomise(converted)
    x = torch.tensor([[0, 6, 6]])
    assert_near(model(x), merged(original, converted)(x), 200 * EPS64)
    model(x).square().sum().backward()
    assert all(factor.grad is not None for factor in converted.factors.values())


def test_rules_that_contradict_each_other_on_a_shared_weight_are_an_error() -> None:
    """The error names the layers and the setting; equal settings are accepted, and so are those irrelevant for a replica."""
    both = ("linear", "embedding")
    for rule, differing in (("lora_r=1", "rank, scaling"), ("lr=0.5", "lr"), ("base_dtype=int8", "base_dtype")):
        message = refusal(Tied(), adapt=both, layers=(f"out: {rule}",))
        assert "words and out share the parameter words.weight" in message
        assert f"({differing})" in message
        spec = plan_of(Tied(), adapt=both, layers=(f"out: {rule}", f"words: {rule}")).adapted[0]
        for name in ("words.weight", "words"):  # which is the parameter's name, and what it lies below
            assert spec == plan_of(Tied(), adapt=both, layers=(f"{name}: {rule}",)).adapted[0]
    assert names(Tied(), layers=("@linear: lora_r=1 base_dtype=int8",)) == names(Tied())
    for rule in ("out: lr=0.5", "@embedding: lr=0.5", "@linear: lr=0.5"):
        assert "(lr)" in refusal(Tied(), layers=(rule,))
    assert plan_of(Tied(), layers=("words: lr=0.5",)).replicas[0].lr == 0.5


def test_a_weight_tied_to_its_transpose_kind_is_a_replica() -> None:
    """transformers' Conv1D stores in x out, nn.Linear out x in: one pair of factors can't serve both."""
    transformers_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"a": transformers_utils.Conv1D(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    adapted, replicas = names(model)
    assert adapted == ["c.weight"]
    assert "a.weight" in replicas


# -- strict ------------------------------------------------------------------------------------------------------------


def leftovers() -> nn.Module:
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "body": linear(), "norm": nn.LayerNorm(4), "odd": nn.Bilinear(4, 4, 4)})
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    return model


def test_strict_names_every_parameter_about_which_nothing_was_said() -> None:
    """Norms and biases of layers with LoRA are known replicas; the rest is listed, with what to do about it."""
    message = refusal(leftovers(), strict=True)
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
        assert fails in refusal(leftovers(), WorkerError, strict=True, **settings)
        return
    assert names(leftovers(), strict=True, **settings) == names(leftovers(), **settings)


def test_strict_is_content_with_frozen_parameters() -> None:
    """A frozen parameter is never left over."""
    model = leftovers()
    for name in ("words", "odd"):
        model[name].requires_grad_(False)
    assert refusal(model, strict=True).count("scale") == 1
    model.scale.requires_grad_(False)
    assert names(model, strict=True)[0] == ["body.weight"]


def test_strict_names_every_parameter() -> None:
    """However many it names."""
    model = nn.ModuleDict({"body": linear(), "odd": nn.ModuleList([nn.Bilinear(4, 4, 4) for _ in range(9)])})
    message = refusal(model, strict=True)
    assert "18 parameter(s)" in message
    assert message.count("odd.") == 18


# -- learning rates, formats, ranks by layer ---------------------------------------------------------------------------


def test_learning_rate_multipliers_reach_weights_biases_and_lone_parameters() -> None:
    """The last rule that matches the layer, or the parameter itself, applies."""
    model = leftovers()
    rules = ("*: lr=0.5", "body: lr=2", "scale: lr=0.1", "odd.bias: lr=0", "@norm: lr=3")
    plan = plan_of(model, layers=rules, lora_bias="lora")
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
    model = nn.Sequential(linear(), linear(), nn.LayerNorm(4))
    settings = {"base_dtype": "int8", "layers": ("1: base_dtype=bf16",), "adapt": ("linear", "norm")}
    plan = plan_of(model, **settings)
    assert [(a.name, a.base_dtype) for a in plan.adapted][:2] == [("0.weight", "int8"), ("1.weight", "bf16")]
    converted = convert(model, config(**settings))
    assert [type(converted.main_weights[f"{i}.weight"].stored).__name__ for i in range(3)] == [
        "QuantizedWeight",
        "QuantizedWeight",
        "Parameter",
    ]


def test_heads_plans_differ_in_rank_and_scaling_only() -> None:
    """Per-head values, for all and in rules; without any, all heads have one plan."""
    model = nn.Sequential(linear(), linear())
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
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 3), "body": linear()})
    message = refusal(model, layers=("up: adapt=true",))
    assert "'up: adapt=true'" in message
    assert "can't have factors" in message
    for pattern in ("*", "body", "body.weight", "body*"):
        assert names(model, adapt=(), layers=(f"{pattern}: adapt=true",))[0] == ["body.weight"]


def test_a_rule_for_a_kind_that_the_model_has_not_is_an_error() -> None:
    """The error names the model's kinds."""
    assert "none of kind conv. It has: linear, norm." in refusal(
        nn.Sequential(linear(), nn.LayerNorm(4)), layers=("@conv: lr=2",)
    )


# -- what can't be merged ----------------------------------------------------------------------------------------------


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    model = nn.Sequential(linear())
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
    assert says in refusal(with_parameter(parameter), WorkerError)
    parameter.requires_grad = False
    assert names(with_parameter(parameter))[0] == ["0.weight"]


def test_integers_that_do_not_train_are_left_alone() -> None:
    """As in modules that are quantized already."""
    model = with_parameter(nn.Parameter(torch.arange(3), requires_grad=False))
    assert names(model) == (["0.weight"], ["0.bias"])
    assert torch.equal(convert(model, config()).model.odd, torch.arange(3))


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d(affine=False)]
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_is_refused_by_name(lazy: nn.Module) -> None:
    """Parameters and statistics that have no shape yet."""
    assert "1.weight has no shape yet" in refusal(nn.Sequential(linear(), lazy), WorkerError).replace("running_mean", "weight")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_of_a_replica_are_refused_before_training(kind: type[nn.Module]) -> None:
    """AdamW fails on them in the first step. The error says what to change; an adapted embedding has dense factors."""
    model = nn.ModuleDict({"words": kind(7, 4, sparse=True), "body": linear()}).double()
    message = refusal(model, WorkerError)
    assert "words.weight" in message
    assert "sparse=False" in message
    assert ("embedding" in message) == (kind is nn.Embedding)
    model["words"].weight.requires_grad_(False)
    assert names(model)[0] == ["body.weight"]
    model["words"].weight.requires_grad_(True)
    if kind is nn.Embedding:
        converted = convert(model, config(adapt=("linear", "embedding")))
        randomise(converted)
        model["words"](torch.tensor([1, 2])).sum().backward()
        assert all(not converted.factors[f"words.weight.lora_{f}"].grad.is_sparse for f in "AB")


def test_a_scalar_and_an_empty_parameter_are_replicas() -> None:
    """A parameter without dimensions, and one without elements."""
    for parameter in (nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0))):
        assert names(with_parameter(parameter))[1] == ["odd", "0.bias"]


# -- models that hold odd modules --------------------------------------------------------------------------------------


def test_a_model_that_was_converted_already_has_nothing_to_adapt() -> None:
    """The error tells a worker that converts its model itself; nothing is adapted twice."""
    model = convert(nn.Sequential(linear()), config()).model
    assert isinstance(model[0], LTELayer)
    assert "nothing to adapt" in refusal(model, WorkerError)


def test_the_shapes_of_names_that_patterns_match() -> None:
    """A pattern names a shared layer by any of its names, and lone parameters; similar names are suggested."""
    model = nn.ModuleDict({"a": linear(), "b": nn.Sequential(linear())})
    model["c"] = model["a"]
    assert names(model, exclude=("c",))[0] == ["b.0.weight"]
    assert names(model, exclude=("a.bias",)) == names(model)
    assert "Did you mean b.0?" in refusal(model, layers=("b.1: lr=2",))
    assert "matches no layer" in refusal(model, layers=("a.weights: lr=2",))


def test_a_rule_that_sets_a_rank_where_there_is_no_lora_is_an_error() -> None:
    """Otherwise a user might think that a layer is adapted or quantized, though it trains as a replica."""
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "body": linear()})
    for text in ("words: lora_r=2", "words: base_dtype=bf16", "norm: lora_bias=frozen", "@embedding: lora_alpha=3"):
        message = refusal(model, layers=(text,))
        assert f"--layers {text!r} sets " in message
        assert "has no LoRA" in message
    for text in ("words: lora_r=2 adapt=true", "words: lr=0.5", "*: lora_r=2", "words: adapt=false lora_r=2"):
        make_plan(model, LTEConfig(lora_r=2, layers=(text,)))
