"""Conversion of a user's model: what is adapted, what is a replica, and that everything else stays the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters import LTELinear, convert
from lte_ray.adapters.plan import make_plan
from lte_ray.config import LTEConfig
from lte_ray.errors import ConfigError, WorkerError
from tests.support.numerics import assert_near
from tests.support.tiny_worker import ADAPTED, REPLICAS, WORDS, Net

LTE = LTEConfig(num_heads=2, lora_r=2, lora_alpha=4.0)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def names(model: nn.Module, lte: LTEConfig = LTE) -> tuple[list[str], list[str]]:
    plan = make_plan(model, lte)
    return [a.name for a in plan.adapted], [r.name for r in plan.replicas]


def randomise(factors: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for factor in factors.values():
        with torch.no_grad():
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))


def test_every_kind_of_parameter_is_sorted_once() -> None:
    """Shared Linear weights are adapted once; biases, norms, lone parameters and a tied embedding are replicas, once."""
    assert names(net()) == (ADAPTED, REPLICAS)


def test_conversion_leaves_outputs_names_and_values_unchanged() -> None:
    """At first the outputs are bitwise the same; all names of the state dict remain, with the same values."""
    original, model = net(), convert(net(), LTE, seed=0, head=1).model
    words = torch.arange(WORDS)
    assert torch.equal(model(words), original(words))
    state = model.state_dict()
    for name, value in original.state_dict().items():
        assert torch.equal(state[name], value), name


def test_layers_that_share_a_weight_share_one_pair_of_factors() -> None:
    """Both layers have the same pair, and the model computes with W + s B A in both places."""
    converted = convert(net(), LTE)
    model, plan = converted.model, converted.plan
    assert model.mid.lte_factors is model.twin.lte_factors
    factors = converted.factors
    randomise(factors)
    original = net()
    weights = dict(original.named_parameters())
    for spec in plan.adapted:
        weights[spec.name] = weights[spec.name] + spec.scaling * factors[spec.b_name] @ factors[spec.a_name]
    words = torch.arange(WORDS)
    # 1e-13: five layers of float64 sums of at most 8 terms.
    assert_near(model(words), torch.func.functional_call(original, weights, (words,)), 1e-13)


def test_a_weight_tied_to_an_embedding_is_a_replica_in_both_places() -> None:
    """The output layer stays an nn.Linear, tied to the embedding."""
    model = convert(net(), LTE).model
    assert type(model.logits) is nn.Linear
    assert model.logits.weight is model.embed.weight
    assert model.embed.weight.requires_grad


def test_only_factors_and_replicas_get_gradients() -> None:
    """After backward, main weights have no gradient and everything that is merged has one."""
    converted = convert(net(), LTE)
    model, plan = converted.model, converted.plan
    randomise(converted.factors)
    model(torch.arange(WORDS)).square().sum().backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[spec.name].grad is None for spec in plan.adapted)
    assert all(factor.grad is not None for factor in converted.factors.values())
    assert all(parameters[r.name].grad is not None for r in plan.replicas)


def test_multihead_attention_trains_as_replicas_where_attention_is_not_adapted() -> None:
    """Its output projection, a subclass of nn.Linear whose forward is never called, isn't adapted; outputs stay the same."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 4)})
    x = torch.randn(2, 3, 8)
    before = model["attention"](x, x, x)[0]
    converted = convert(model, dataclasses.replace(LTE, adapt=("linear",)))
    model, plan = converted.model, converted.plan
    assert [a.name for a in plan.adapted] == ["out.weight"]
    assert "attention.out_proj.weight" in [r.name for r in plan.replicas]
    after = model["attention"](x, x, x)[0]
    assert torch.equal(after, before)
    after.sum().backward()
    assert model["attention"].out_proj.weight.grad is not None


def test_a_bare_linear_can_be_the_whole_model() -> None:
    """It is replaced by an LTELinear, under the names weight and bias."""
    linear = nn.Linear(5, 4)
    converted = convert(linear, LTE)
    model, plan = converted.model, converted.plan
    assert isinstance(model, LTELinear)
    assert [a.name for a in plan.adapted] == ["weight"]
    assert [r.name for r in plan.replicas] == ["bias"]
    assert sorted(converted.factors) == ["weight.lora_A", "weight.lora_B"]


def test_one_module_at_two_places_stays_one() -> None:
    """It is adapted once, and both places have the same layer."""
    layer = nn.Linear(4, 4)
    converted = convert(nn.Sequential(layer, nn.Tanh(), layer), LTE)
    model, plan = converted.model, converted.plan
    assert [a.name for a in plan.adapted] == ["0.weight"]
    assert isinstance(model[0], LTELinear)
    assert model[0] is model[2]


def test_a_layers_hooks_still_run() -> None:
    """A forward hook that a worker put on a linear layer changes the outputs after conversion as before."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    x = torch.ones(1, 4)
    before = model(x)
    assert torch.equal(convert(model, LTE).model(x), before)


def test_frozen_parameters_are_left_alone() -> None:
    """A frozen weight gets no factors and a frozen bias is no replica; both stay as they are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    frozen = model[0]
    converted = convert(model, LTE)
    model, plan = converted.model, converted.plan
    assert ([a.name for a in plan.adapted], [r.name for r in plan.replicas]) == (["1.weight"], ["0.bias"])
    assert model[0] is frozen
    assert not model[1].bias.requires_grad


def test_heads_and_layers_get_different_factors_and_a_head_always_the_same() -> None:
    """A differs between heads and between layers, and is bitwise the same when a head is built again; B is zero."""

    def factors(head: int) -> dict[str, Tensor]:
        return convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LTE, seed=5, head=head).factors

    first, again, other = factors(0), factors(0), factors(1)
    assert torch.equal(first["0.weight.lora_A"], again["0.weight.lora_A"])
    assert not torch.allclose(first["0.weight.lora_A"], other["0.weight.lora_A"], atol=0.1)
    assert not torch.allclose(first["0.weight.lora_A"], first["1.weight.lora_A"], atol=0.1)
    assert not first["0.weight.lora_B"].any()


@pytest.mark.parametrize(
    ("exclude", "adapted"),
    [
        (("up",), ["mid.weight", "down.weight"]),
        (("twin",), ["up.weight", "down.weight"]),  # a weight is excluded with any layer that holds it
        (("[mu]*",), ["down.weight"]),
        (("up", "down"), ["mid.weight"]),
        (("scales", "norm"), None),
    ],
)
def test_exclude_makes_layers_replicas(exclude: tuple[str, ...], adapted: list[str] | None) -> None:
    """Excluded layers' weights train as replicas; a pattern must match a layer's name."""
    lte = LTEConfig(lora_r=2, exclude=exclude)
    if adapted is None:
        with pytest.raises(ConfigError, match="matches no layer"):
            make_plan(net(), lte)
        return
    found, replicas = names(net(), lte)
    assert found == adapted
    assert set(ADAPTED) - set(adapted) <= set(replicas)


def test_a_pattern_names_all_that_lies_below() -> None:
    """'body' excludes 'body.0' and 'body.1', not 'bodyguard'."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "bodyguard": nn.Linear(4, 4)})
    assert names(model, LTEConfig(lora_r=2, exclude=("body",)))[0] == ["bodyguard.weight"]


def test_a_pattern_without_a_match_suggests_a_near_name() -> None:
    """The error names the pattern, a layer with a similar name, and all layers."""
    with pytest.raises(ConfigError, match=r"--exclude 'dwon' matches no layer.* Did you mean down\?.*embed, up, norm"):
        make_plan(net(), LTEConfig(lora_r=2, exclude=("dwon",)))


def test_a_rank_too_high_for_a_layer_is_cut_to_what_it_can_use() -> None:
    """Rank min(out, in) can represent any W; s remains alpha / the configured rank, as in other layers."""
    converted = convert(net(), LTEConfig(lora_r=7, lora_alpha=7.0))
    assert [(a.matrix, a.rank, a.scaling) for a in converted.plan.adapted] == [
        ((8, 6), 6, 1.0),
        ((8, 8), 7, 1.0),
        ((6, 8), 6, 1.0),
    ]
    a, b = converted.factors["up.weight.lora_A"].detach(), torch.randn(8, 6, dtype=torch.float64)
    assert_near(torch.linalg.lstsq(a.T, b.T).solution.T @ a, b, 1e-12)  # A is square and orthogonal but for a factor


def test_a_model_must_have_something_to_train_and_to_adapt() -> None:
    """Frozen models, models without a linear layer, and models whose layers are all excluded are refused."""
    with pytest.raises(WorkerError, match="no parameter that trains"):
        make_plan(net().requires_grad_(False), LTE)
    with pytest.raises(WorkerError, match=r"nothing to adapt.*LoRA heads need at least one"):
        make_plan(nn.LayerNorm(4), LTE)
    with pytest.raises(WorkerError, match=r"nothing to adapt.*left by --exclude"):
        make_plan(net(), LTEConfig(lora_r=2, exclude=("*",)))


def test_without_a_kind_to_adapt_everything_is_a_replica() -> None:
    """Also where it is strict, and with no layer that could have factors; what only factors use is refused."""
    for adapt in ((), ("none",), "none"):
        plan = make_plan(net(), LTEConfig(adapt=adapt, strict=True))
        assert (plan.adapted, [r.name for r in plan.replicas]) == ((), [name for name, _ in net().named_parameters()])
    assert len(make_plan(nn.LayerNorm(4), LTEConfig(adapt=())).replicas) == 2
    for setting in ({"reset": "B"}, {"base_dtype": "int8"}):
        with pytest.raises(ConfigError, match="but --adapt none leaves no layer with factors"):
            make_plan(net(), LTEConfig(adapt=(), **setting))
    with pytest.raises(ConfigError, match="--adapt is none and conv, which contradict each other"):
        LTEConfig(adapt=("none", "conv"))
    some = make_plan(net(), LTEConfig(adapt=(), lora_r=2, layers=("up: adapt=true",)))
    assert [a.name for a in some.adapted] == ["up.weight"]


def test_a_complex_parameter_is_refused_by_name() -> None:
    """Only real floating-point numbers can be merged."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(WorkerError, match=r"phase trains and has type torch.complex64"):
        make_plan(model, LTE)


def test_running_statistics_are_replicas_and_bad_parameters_are_named() -> None:
    """Means and variances of batch normalization are merged; a lazy layer without shapes is one clear error."""
    plan = make_plan(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), LTE)
    assert [r.name for r in plan.replicas] == [
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    with pytest.raises(WorkerError, match="lazy layer"):
        make_plan(nn.Sequential(nn.LazyLinear(4)), LTE)
