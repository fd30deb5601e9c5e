"""`prepare_model_for_lte`: what it accepts, refuses, names, and returns."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray import LTEConfig, LTEError, LTELayer, MultiheadReplicaLayer, prepare_model_for_lte
from lte_ray.adapters import convert
from lte_ray.errors import ConfigError
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import HEADS, MODES, SEED, UNIFORM, ModelCase, perturb, prepare
from tests.support.numerics import assert_near


class Mixed(nn.Module):
    """Adapted layers, a norm, an embedding, an activation with a parameter, and lone parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.embed = nn.Embedding(7, 4)
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.LayerNorm(4)
        self.act = nn.PReLU()
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)})

    def forward(self, words: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(words), -1, -1), self.embed(words)], 1)
        x = self.act(self.norm(self.conv(x.mT).mT * self.gates[0] + self.gates[1]))
        return torch.cat([self.heads["a"](x), self.heads["b"](x)], -1)


UNMENTIONED = ["token", "embed.weight", "act.weight", "gates.0", "gates.1"]
WORDS = torch.arange(12).view(4, 3) % 7


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


def replica_names(model: nn.Module) -> set[str]:
    """Names of the unconverted model's parameters that train as one copy for each head."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, MultiheadReplicaLayer):
            names |= {f"{name}.{part}" for part, _ in module.main.named_parameters()}
        for path, part, _ in getattr(module, "lte_looped_parameters", ()):
            names.add(".".join(filter(None, (name, path, part))))
    return names


def trains(model: nn.Module) -> bool:
    """Whether gradients reach exactly what requires them, and merges change all weights of the unconverted model."""
    before = merged_state_dict(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero at first, so A changes only in the second step
        optimizer.zero_grad()
        model(WORDS).sin().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        MergeCondition(model).merge()
    after = merged_state_dict(model)
    return all(not torch.equal(after[name], value) for name, value in before.items())


def test_strict_names_everything_that_was_left_out() -> None:
    """One error lists every parameter and the remedies, but no biases and norms, which always train as replicas."""
    for mode in MODES:
        with pytest.raises(ConfigError) as caught:
            prepare_model_for_lte(mixed(), UNIFORM, mode=mode)
        message = str(caught.value)
        assert f"5 parameter(s) train without LoRA, but nothing mentions them: {', '.join(UNMENTIONED)}. " in message
        for remedy in ("replica_layers=[...]", "requires_grad_(False)", "disable_norm_affine_parameters", "strict=False"):
            assert remedy in message


def test_a_refused_model_is_left_as_it_was() -> None:
    """After the error the model is unconverted, everything in it still trains, and it can be prepared."""
    model = mixed()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError):
        prepare_model_for_lte(model, UNIFORM)
    assert [type(m) for m in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters())
    assert trains(prepare_model_for_lte(model, UNIFORM, replica_layers=UNMENTIONED))


@pytest.mark.parametrize("mode", MODES)
def test_strict_false_warns_and_trains_everything(mode: str) -> None:
    """The warning lists what trains without LoRA; all of these train, as replicas in ddp and dmp."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = prepare_model_for_lte(mixed(), UNIFORM, mode=mode, strict=False, seed=SEED)
    if mode == "mhlora":  # they are plain parameters that train
        assert not caught
        model(WORDS).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert {n for n, p in model.named_parameters() if p.requires_grad} >= set(UNMENTIONED)
        return
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in UNMENTIONED)
    assert caught[0].filename == __file__
    assert set(UNMENTIONED) <= replica_names(model)
    assert trains(model)


SPELLINGS: dict[str, Callable[[Mixed], list[Any]]] = {
    "modules": lambda model: [model.embed, model.act, model.gates, model.token],
    "parameters": lambda model: [model.token, model.embed.weight, model.act.weight, *model.gates],
    "patterns": lambda model: ["t*", "emb*", "act", "gates.*"],
    "mixture": lambda model: ["token", model.embed, "act.*", model.gates[0], "gates.1"],
}


@pytest.mark.parametrize(
    ("spelling", "mode"), [("modules", "ddp"), ("parameters", "dmp"), ("patterns", "dmp"), ("mixture", "ddp")]
)
def test_replica_layers_can_be_spelled_in_many_ways(spelling: str, mode: str) -> None:
    """Modules, containers, parameters, and patterns mean the same as names, and train the same."""
    model, other = mixed(), mixed()
    prepare_model_for_lte(model, UNIFORM, mode=mode, replica_layers=SPELLINGS[spelling](model), seed=SEED)
    prepare_model_for_lte(other, UNIFORM, mode=mode, replica_layers=UNMENTIONED, seed=SEED)
    assert set(UNMENTIONED) <= replica_names(model)
    assert {n for n, m in model.named_modules() if isinstance(m, LTELayer)} == {"conv", "heads.a", "heads.b"}
    for m in (model, other):
        assert trains(m)
    for name, value in merged_state_dict(other).items():
        assert_near(merged_state_dict(model)[name], value, 1e-13)  # two steps in float64


def test_what_is_named_gets_no_lora() -> None:
    """A module that could be adapted, a container of such modules, and a module instead of a list."""
    model = mixed().requires_grad_(False)
    model.heads.requires_grad_(True)
    model.conv.requires_grad_(True)
    prepare_model_for_lte(model, UNIFORM, replica_layers=model.heads)
    assert [type(m) for m in model.heads.values()] == [MultiheadReplicaLayer] * 2
    assert isinstance(model.conv, LTELayer)
    model = prepare_model_for_lte(mixed(), UNIFORM, replica_layers=["heads.a", *UNMENTIONED])
    assert isinstance(model.heads["a"], MultiheadReplicaLayer)
    assert isinstance(model.heads["b"], LTELayer)


def test_a_weight_that_is_named_gets_no_lora() -> None:
    """A parameter of a layer that could be adapted: the layer's forward runs once for each head instead."""
    model = prepare_model_for_lte(mixed(), UNIFORM, replica_layers=["heads.a.weight", "heads.a.bias", *UNMENTIONED])
    assert not isinstance(model.heads["a"], LTELayer)
    assert {"heads.a.weight", "heads.a.bias"} <= replica_names(model)
    assert trains(model)


def test_unknown_names_are_an_error_with_the_nearest_one() -> None:
    """In replica_layers, in the config's patterns, in mode and chunk; also modules of other models, and the model itself."""
    model = mixed()
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"replica_layers": ["embde"]}, {}, "embde"),
        ({"replica_layers": [nn.Linear(2, 2)]}, {}, "replica_layers has Linear"),
        ({"replica_layers": [nn.Parameter(torch.ones(1))]}, {}, "replica_layers has Parameter"),
        ({"replica_layers": [model]}, {}, "the model itself"),
        ({"replica_layers": [3]}, {}, "replica_layers has 3"),
        ({"mode": "DDP"}, {}, "mode is 'DDP', but it must be one of: ddp, dmp, mhlora"),
        ({"chunk": "models"}, {}, "chunk is 'models', but it must be one of: layer, model. Did you mean model"),
        ({}, {"exclude": ("cnov",)}, "cnov"),
        ({}, {"layers": ("cnov: lora_r=1",)}, "cnov"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(LTEError) as caught:
            prepare_model_for_lte(model, LTEConfig(num_heads=2, lora_r=2, **settings), **arguments)
        assert message in str(caught.value)


def test_settings_for_ray_heads_are_refused_by_name() -> None:
    """base_dtype for all layers or for one, and learning rates: the error says where they apply and what to do instead."""
    for settings, message in (
        ({"base_dtype": "nf4"}, r"base_dtype is nf4 for conv.weight: that is for Ray heads .*LTETrainer.*model\.to"),
        ({"layers": ("heads.b: base_dtype=bf16",)}, r"base_dtype is bf16 for heads.b.weight"),
        ({"layers": ("heads.b: lr=2",)}, r"lr is 2 for heads.b.weight.*parameter groups"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_model_for_lte(mixed(), LTEConfig(num_heads=2, lora_r=2, **settings), strict=False)


def test_nothing_to_adapt_is_an_error() -> None:
    """A model without a layer that LoRA supports, one whose layers don't train, and one that is frozen."""
    frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.LayerNorm(4))
    for model in (nn.Sequential(nn.LayerNorm(4)), frozen, nn.Sequential(nn.LayerNorm(4)).requires_grad_(False)):
        with pytest.raises(LTEError):
            prepare_model_for_lte(model, UNIFORM)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_prepared_once(mode: str) -> None:
    """A second time is an error for the model, for a copy of it, and for a model that contains it."""
    model = prepare_model_for_lte(mixed(), UNIFORM, mode=mode, replica_layers=UNMENTIONED)
    for again in (model, copy.deepcopy(model), nn.Sequential(model, nn.Linear(5, 5))):
        with pytest.raises(ConfigError, match="prepared for LTE already"):
            prepare_model_for_lte(again, UNIFORM, strict=False)


def test_the_error_for_an_indivisible_batch_names_batches_that_work() -> None:
    """From a layer, from the model, and from a loop over heads. Evaluation and mhlora take any batch."""
    for arguments in ({}, {"chunk": "model"}, {"mode": "dmp"}):
        model = prepare_model_for_lte(mixed(), UNIFORM, replica_layers=UNMENTIONED, **arguments)
        with pytest.raises(ValueError, match=r"batch of 3 can't be split over 2 heads.*Use a batch of 2 or 4"):
            model(WORDS[:3])
        with pytest.raises(ValueError, match=r"batch of 1 can't be split over 2 heads.*Use a batch of 2 "):
            model(WORDS[:1])
        with pytest.raises(ValueError, match=r"batch of 0"):
            model(WORDS[:0])
        assert model.eval()(WORDS[:3]).shape == (3, 4, 5)
    assert prepare_model_for_lte(mixed(), UNIFORM, mode="mhlora", replica_layers=UNMENTIONED)(WORDS[:3]).shape == (3, 4, 5)


def test_an_error_leaves_the_model_usable() -> None:
    """After a refused batch the next one gives what it would have given before."""
    for chunk in ("layer", "model"):
        model = prepare_model_for_lte(mixed(), UNIFORM, replica_layers=UNMENTIONED, chunk=chunk)
        expected = model(WORDS)
        with pytest.raises(ValueError, match="can't be split"):
            model(WORDS[:3])
        assert torch.equal(model(WORDS), expected)
        assert model.heads["a"].weight.sum().isfinite()


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_fresh_weights(mode: str) -> None:
    """copy_weights=False initializes adapted layers' weights and biases as their constructors do and leaves the rest."""
    torch.manual_seed(1)
    expected = nn.Linear(4, 3)
    model = Mixed().requires_grad_(False)
    model.heads["a"].requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    prepare_model_for_lte(model, UNIFORM, copy_weights=False, mode=mode)
    after = merged_state_dict(model)
    assert torch.equal(after["heads.a.weight"], expected.weight)
    assert torch.equal(after["heads.a.bias"], expected.bias)
    for name in set(before) - {"heads.a.weight", "heads.a.bias"}:
        assert torch.equal(after[name], before[name])
    x = torch.randn(2, 4)
    assert_near(model.heads["a"](x), expected(x), 1e-6)  # float32, one product of 4 terms
    torch.manual_seed(1)
    attention = prepare_model_for_lte(nn.MultiheadAttention(4, 2, batch_first=True), UNIFORM, copy_weights=False, mode=mode)
    assert attention.in_proj.weight.any()
    assert not attention.in_proj.bias.any()  # as nn.MultiheadAttention initializes it


@pytest.mark.filterwarnings("ignore:.*batch_first=False")
def test_special_attention_scaling_is_off_unless_it_is_asked_for() -> None:
    """With it, split or fused: in_proj, q_proj, and k_proj get sqrt(alpha); v_proj, out_proj, and other layers keep alpha."""
    lte = LTEConfig(num_heads=2, lora_r=2, lora_alpha=16.0)
    for extra, rooted in (({}, {"in_proj"}), ({"kdim": 3, "vdim": 3}, {"q_proj", "k_proj"})):
        for special in (True, False, None):
            model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, **extra), "linear": nn.Linear(4, 4)})
            prepare_model_for_lte(model, lte, **{} if special is None else {"use_special_attention_scaling": special})
            layers = {n.split(".")[-1]: m for n, m in model.named_modules() if isinstance(m, LTELayer)}
            assert rooted < set(layers)
            for name, layer in layers.items():
                alpha = 4.0 if special and name in rooted else 16.0
                assert math.isclose(layer.scaling, alpha / 2)
                assert math.isclose(layer.lora_alpha, alpha)


def test_seeds_draw_what_ray_heads_draw() -> None:
    """A of head h is that of Ray head h with this seed; without a seed, torch's generator decides."""
    heads = [convert(mixed(), UNIFORM, seed=SEED, head=head) for head in range(HEADS)]
    for mode in MODES:
        model = prepare_model_for_lte(mixed(), UNIFORM, mode=mode, replica_layers=UNMENTIONED, seed=SEED)
        layer = model.heads["a"]
        factors = [f.weight for f in layer.lora_A] if mode == "dmp" else list(layer.lora_A_weight)
        for a, head in zip(factors, heads, strict=True):
            assert torch.equal(a, head.factors["heads.a.weight.lora_A"])

    def unseeded(start: int) -> Tensor:
        torch.manual_seed(start)
        a: Tensor = prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4)), UNIFORM)[0].lora_A_weight
        return a

    assert torch.equal(unseeded(1), unseeded(1))
    assert not torch.equal(unseeded(1), unseeded(2))


def test_a_model_on_the_meta_device() -> None:
    """It can be prepared, called, and merged."""
    with torch.device("meta"):
        model = Mixed()
    for mode in MODES:
        prepared = prepare_model_for_lte(copy.deepcopy(model), UNIFORM, mode=mode, replica_layers=UNMENTIONED)
        assert all(p.is_meta for p in prepared.parameters())
        assert prepared(torch.zeros(4, 3, dtype=torch.long, device="meta")).shape == (4, 4, 5)
        MergeCondition(prepared).merge()


class TransposedLinear(nn.Module):
    """transformers' Conv1D, whose weight is stored as in x out, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.down = Conv1D(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


LOADED: dict[str, ModelCase] = {
    "bare-attention": ModelCase(lambda: nn.MultiheadAttention(4, 2, batch_first=True), ()),
    "split-attention": ModelCase(lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4, add_zero_attn=True), ()),
    "conv1d": ModelCase(TransposedLinear, ()),
    "mixed": ModelCase(Mixed, (), words=True),
}


@pytest.mark.parametrize(("bias", "mode"), [("replica", "ddp"), ("lora", "dmp"), ("lora", "mhlora")])
@pytest.mark.parametrize("kind", list(LOADED))
def test_merged_weights_load_into_the_unconverted_model(kind: str, bias: str, mode: str) -> None:
    """`load_state_dict(strict=True)` takes them, and the original then computes what evaluation does."""
    if kind == "conv1d":
        pytest.importorskip("transformers")
    case = LOADED[kind]
    lte = dataclasses.replace(UNIFORM, lora_bias=bias, adapt=("linear", "attention", "conv", "embedding"))
    model = perturb(prepare(case, mode, lte))
    MergeCondition(model).merge()
    state, original = merged_state_dict(model), case.build()
    assert set(state) == set(original.state_dict())
    assert any(not torch.equal(state[name], value) for name, value in original.state_dict().items())
    original.load_state_dict(state, strict=True)
    inputs: tuple[Tensor, ...] = (WORDS,)
    if not case.words:
        x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs = (x,) * (3 if kind.endswith("attention") else 1)
    actual, expected = model.eval()(*inputs), original.eval()(*inputs)
    # 1e-12: products of three such layers of order 10, in float64.
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for a, e in pairs:
        assert_near(a, e, 1e-12)


def test_merged_weights_are_a_copy() -> None:
    """Further training doesn't change an earlier state dict."""
    model = prepare_model_for_lte(mixed(), UNIFORM, replica_layers=UNMENTIONED)
    state = merged_state_dict(model)
    before = copy.deepcopy(state)
    assert trains(model)
    assert all(torch.equal(state[name], value) for name, value in before.items())
