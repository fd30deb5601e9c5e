"""Layers of the in-process modes: what they compute, keep and refuse, and what went wrong in the authors' library."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lte_ray
from lte_ray import LTEConfig, LTELayer, prepare_model_for_lte
from lte_ray.misc import MergeCondition, use_custom_attention
from lte_ray.modes import MultiheadReplicaLayer, dmp, merged_state_dict
from tests.support.helpers import assert_near
from tests.unit.modes.test_equal import HEADS, LTE, MODELS, SEED, Attention, Tied, batch, build, loss

MODES = ["ddp", "dmp", "mhlora"]
PLAIN = LTEConfig(num_heads=HEADS, lora_r=2, lora_alpha=4.0)


def prepare(kind: str, mode: str, lte: LTEConfig = LTE) -> nn.Module:
    return prepare_model_for_lte(build(kind), lte, mode=mode, strict=False, seed=SEED, use_special_attention_scaling=False)


def linear(mode: str, *, bias: bool = True, lte: LTEConfig = PLAIN) -> nn.Module:
    """One layer, alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias)).double()
    return prepare_model_for_lte(model, lte, mode=mode, seed=SEED)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Adds noise to all that trains; it stays zero where ranks are padded."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
            p.add_(noise * (p != 0) if "lora_A" in name else noise)
    for module in model.modules():
        if hasattr(module, "lora_B_weight"):
            for head, spec in enumerate(module.specs):
                module.lora_B_weight[head, :, spec.rank :] = 0


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_outputs_are_unchanged_at_first(kind: str, mode: str) -> None:
    """B = 0: in training and in evaluation the model computes what it did (batch norm: on each head's part)."""
    x, _ = batch(kind, 0)
    original, model = build(kind), prepare(kind, mode)
    parts = [x] if mode == "mhlora" else x.chunk(HEADS)
    assert_near(model(x), torch.cat([original(part) for part in parts]), 1e-14)
    assert_near(prepare(kind, mode).eval()(x), build(kind).eval()(x), 1e-14)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_evaluation_uses_the_merged_weights_alone(kind: str, mode: str) -> None:
    """It equals the unconverted model with `merged_state_dict`; in ddp and dmp it changes at merges only."""
    x, _ = batch(kind, 0)
    model = prepare(kind, mode).eval()
    before = model(x)
    shake(model)
    if mode != "mhlora":
        assert torch.equal(model(x), before)
        MergeCondition(model).merge()
    assert not torch.allclose(model(x), before)
    original = build(kind).eval()
    original.load_state_dict(merged_state_dict(model))
    assert_near(model(x), original(x), 1e-13)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_state_dict_deepcopy_and_pickle_keep_all(kind: str, mode: str) -> None:
    """After a merge and further steps, each way of copying computes the same in training and after another merge."""
    x, _ = batch(kind, 0)
    model = prepare(kind, mode)
    for _ in range(2):
        shake(model)
        MergeCondition(model).merge()
    shake(model)
    loaded = prepare(kind, mode)
    loaded.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [loaded, copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    expected = [model(x)]
    MergeCondition(model).merge()
    expected += [model(x), model.eval()(x)]
    for other in others:
        assert torch.equal(other(x), expected[0])
        MergeCondition(other).merge()
        assert torch.equal(other(x), expected[1])
        assert torch.equal(other.eval()(x), expected[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_another_type_later(mode: str) -> None:
    """A model prepared in float32 that becomes float64 computes as it did, and what is shared is still merged once."""
    torch.manual_seed(0)
    model = prepare_model_for_lte(Tied(), PLAIN, mode=mode, strict=False, seed=SEED)
    shake(model)
    x, _ = batch("tied", 0)
    single = copy.deepcopy(model)
    double = model.double()
    # 1e-5: float32 sums of a few terms, and values of order 1.
    assert_near(double(x), single(x), 1e-5)
    for m in (double, single):
        MergeCondition(m).merge()
    assert_near(double.eval()(x), single.eval()(x), 1e-5)
    assert all(p.dtype == torch.float64 for p in double.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_layers_stay_what_they_were(mode: str) -> None:
    """The same objects, which are LTELayer and nn.Linear at once; only factors and the heads' biases train."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    weight = layer.weight
    model = prepare_model_for_lte(nn.Sequential(layer), PLAIN, mode=mode)
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer, LTELayer)
    assert isinstance(layer, nn.Linear)
    assert (layer.num_heads, layer.lora_r, layer.lora_alpha, layer.scaling, float(layer.merged)) == (2, 2, 4.0, 2.0, 0.0)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained - {name for name in trained if "lora_" in name} == {"bias" if mode == "mhlora" else "bias_replicas"}
    assert "heads=2, rank=2, s=2.0" in repr(layer)


def test_the_authors_attributes() -> None:
    """ddp has stacked factors and references; dmp lists of layers and factors, with their shapes."""
    ddp, dmp = linear("ddp")[0], linear("dmp")[0]
    assert ddp.lora_A_weight.shape == ddp.prev_lora_A_weight.shape == (HEADS, 2, 5)
    assert ddp.lora_B_weight.shape == ddp.prev_lora_B_weight.shape == (HEADS, 4, 2)
    assert [m.weight.shape for m in dmp.layers] == [(4, 5)] * HEADS
    assert [m.weight.shape for m in dmp.lora_A] == [(2, 5)] * HEADS
    assert [m.weight.shape for m in dmp.lora_B] == [(4, 2)] * HEADS
    assert all(torch.equal(one.weight, a) for one, a in zip(dmp.lora_A, ddp.lora_A_weight, strict=True))


def test_ranks_that_differ_by_head_are_padded_and_stay_so() -> None:
    """The padding is zero, gets no gradient, and is zero still after training with weight decay and merges."""
    lte = LTEConfig(num_heads=2, lora_r=(1, 3), lora_alpha=(1.0, 6.0))
    model = linear("ddp", lte=lte)
    layer, optimizer = model[0], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert not layer.lora_A_weight.grad[0, 1:].any()
        assert not layer.lora_B_weight.grad[0, :, 1:].any()
        optimizer.step()
        layer.merge_parameters()
    assert layer.scaling == (1.0, 2.0)
    assert not layer.lora_A_weight[0, 1:].any()
    assert not layer.lora_B_weight[0, :, 1:].any()
    assert layer.lora_B_weight[1].all()


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize("reset", ["none", "B"])
def test_merge_resets_what_the_config_says(mode: str, reset: str) -> None:
    """Reset-less, a head's function is W + (mean - own) s B A less the reference; with "B", B is zero and A is kept."""
    model = linear(mode, lte=LTEConfig(num_heads=2, lora_r=2, lora_alpha=4.0, reset=reset, lora_bias="frozen"))
    shake(model)
    layer = model[0]
    before = [p.detach().clone() for p in factors(model)]
    start, x = layer.weight.clone(), torch.randn(4, 5, dtype=torch.float64)
    layer.merge_parameters()
    assert not torch.equal(layer.weight, start)
    assert torch.equal(model(x), model.eval()(x)) == (reset == "B")
    # 1e-14: W + s B A - s B A, in float64.
    assert_near(model.train()(x), model.eval()(x), 1e-14)
    for (name, p), old in zip(((n, p) for n, p in model.named_parameters() if "lora_" in n), before, strict=True):
        assert torch.equal(p, torch.zeros_like(old) if reset == "B" and "lora_B" in name else old)
    merged = layer.weight.clone()
    layer.merge_parameters()
    assert_near(layer.weight, merged, 1e-15)


def test_the_authors_reset_kept_the_old_reference() -> None:
    """`reset_lora_parameters` draws another A and leaves every head at W, with all that was merged still in it."""
    for mode in MODES:
        model = linear(mode)
        shake(model)
        layer = model[0]
        layer.merge_parameters()
        weight, old = layer.weight.clone(), factors(model)[0].detach().clone()
        layer.reset_lora_parameters()
        x = torch.randn(4, 5, dtype=torch.float64)
        plain = x @ weight.T
        assert_near(model(x) - plain, (model(torch.zeros_like(x))), 1e-14)
        assert torch.equal(layer.weight, weight)
        assert not torch.equal(factors(model)[0], old)


def test_the_authors_dmp_failed_without_bias() -> None:
    """bias=False: trains, merges and evaluates."""
    for mode in MODES:
        model = linear(mode, bias=False)
        shake(model)
        MergeCondition(model).merge()
        assert model.train()(torch.ones(2, 5, dtype=torch.float64)).shape == (2, 4)
        assert list(merged_state_dict(model)) == ["0.weight"]


def test_the_authors_mhlora_lacked_one_over_n() -> None:
    """Heads that are all alike compute what one of them does, however many there are."""
    x = torch.randn(3, 5, dtype=torch.float64)
    outputs = []
    for heads in (1, 4):
        model = linear("mhlora", lte=LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0))
        with torch.no_grad():
            for p in factors(model):
                p.copy_(torch.linspace(-1, 1, p[0].numel()).view(p[0].shape).expand(p.shape))
        outputs.append(model(x))
    assert_near(outputs[1], outputs[0], 1e-14)


def test_the_authors_attention_dropped_out_in_evaluation() -> None:
    """Evaluation is the same twice, and what the model computes without dropout."""
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    for mode in MODES:
        torch.manual_seed(0)
        original = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)).double().eval()
        with torch.no_grad():
            expected = original(x)
        model = use_custom_attention(copy.deepcopy(original)).train()
        prepare_model_for_lte(model, PLAIN, mode=mode)
        assert not torch.equal(model(x), model(x))
        with torch.no_grad():
            assert_near(model.eval()(x), expected, 1e-14)
            assert torch.equal(model(x), model(x))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_the_authors_dmp_kept_dense_changes_of_all_heads() -> None:
    """Nothing of H x out x in is ever made in a merge or kept: factors, one weight, and the copies."""
    heads, width = 4, 32
    for mode in ("ddp", "dmp"):
        torch.manual_seed(0)
        lte = LTEConfig(num_heads=heads, lora_r=1, lora_alpha=2.0, lora_bias="frozen")
        model = prepare_model_for_lte(nn.Sequential(nn.Linear(width, width)), lte, mode=mode)
        kept = sum(t.numel() for t in model.state_dict().values())
        largest = Largest()
        with largest:
            for _ in range(2):
                MergeCondition(model).merge()
        assert largest.elements == width * width
        after = sum(t.numel() for t in model.state_dict().values())
        copies = heads * width * width if mode == "dmp" else 0
        numbers = 3  # merged, and what A is drawn from
        assert kept == after == width * width + width + numbers + copies + 2 * heads * 2 * width


def test_a_batch_that_cannot_be_shared_out() -> None:
    """The error is a ValueError and an LTEError that names batch, heads and what to change; one sample is enough in mhlora."""
    x = torch.randn(3, 5, dtype=torch.float64)
    for mode in ("ddp", "dmp"):
        model = linear(mode)
        with pytest.raises(ValueError, match=r"batch of 3 can't be split over 2 heads.* a batch of 2 or 4") as caught:
            model(x)
        assert isinstance(caught.value, lte_ray.LTEError)
        with pytest.raises(ValueError, match="no batch dimension"):
            model(x[0])
        assert model.eval()(x[0]).shape == (4,)
    assert linear("mhlora")(x[0]).shape == (4,)


def test_roots_of_alpha_for_attention_inputs() -> None:
    """With the authors' switch, layers whose name contains in_proj, q_proj or k_proj have alpha ** 0.5 as alpha."""
    for special, expected in ((True, 1.0), (False, 2.0)):
        torch.manual_seed(0)
        model = prepare_model_for_lte(
            Attention(), PLAIN, strict=False, replica_layers=["attention.bias_*"], use_special_attention_scaling=special
        )
        assert math.isclose(model.attention.in_proj.scaling, expected)
        assert model.attention.out_proj.scaling == model.out.scaling == 2.0


def test_seeds_and_fresh_weights() -> None:
    """Without a seed torch's generator decides; copy_weights=False draws weights anew; else they stay."""

    def made(**kwargs: object) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4))
        torch.manual_seed(1)
        return prepare_model_for_lte(model, PLAIN, **kwargs)

    torch.manual_seed(0)
    original = nn.Linear(5, 4)
    first, second = made(), made()
    assert torch.equal(first[0].lora_A_weight, second[0].lora_A_weight)
    assert not torch.equal(first[0].lora_A_weight, made(seed=5)[0].lora_A_weight)
    assert torch.equal(first[0].weight, original.weight)
    fresh = made(copy_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(fresh.weight, nn.Linear(5, 4).weight)
    assert torch.equal(fresh.bias_replicas[1], fresh.bias)


def test_bfloat16_models_are_merged_in_float32() -> None:
    """The merge of a bfloat16 weight is the float32 result, rounded once."""
    for mode in ("ddp", "dmp"):
        model = linear(mode, lte=LTEConfig(num_heads=2, lora_r=2, lora_alpha=4.0, lora_bias="frozen")).to(torch.bfloat16)
        shake(model)
        exact = copy.deepcopy(model).float()
        for m in (model, exact):
            MergeCondition(m).merge()
        assert torch.equal(model[0].weight, exact[0].weight.to(torch.bfloat16))


def test_norms_become_replicas_that_show_the_merged_ones_attributes() -> None:
    """A norm is a MultiheadReplicaLayer; its other attributes are the merged module's."""
    torch.manual_seed(0)
    model = prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), PLAIN)
    norm = model[1]
    assert isinstance(norm, MultiheadReplicaLayer)
    assert isinstance(norm, lte_ray.ReplicaLayer)
    assert norm.normalized_shape == (4,)
    assert norm.weight is norm.main.weight
    assert len(norm.replicas) == HEADS
    model(torch.randn(2, 4)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradients_reach_everything_that_trains_and_nothing_else() -> None:
    """After one backward pass with B != 0."""
    for mode in MODES:
        for kind in ("linear", "attention", "batch-norm"):
            model = prepare_model_for_lte(
                build(kind), LTE, mode=mode, strict=False, replica_layers=["attention.bias_*"] if kind == "attention" else ()
            )
            shake(model)
            x, target = batch(kind, 0)
            loss(model(x), target).backward()
            assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_what_is_for_ray_heads_is_one_error() -> None:
    """base_dtype and learning-rate multipliers of layers; a mode that there isn't; a model that was prepared already."""
    cases = [
        ({"base_dtype": "bf16"}, {}, "base_dtype is bf16 for 0.weight: that is for Ray heads"),
        ({"layers": ("0: lr=0.5",)}, {}, "lr is 0.5 for 0.weight"),
        ({}, {"mode": "dpp"}, "mode is 'dpp', but it must be one of: ddp, dmp, mhlora. Did you mean 'ddp'"),
        ({}, {"chunk": "head"}, "chunk is 'head'"),
        ({}, {"replica_layers": [nn.Linear(2, 2)]}, "replica_layers has Linear"),
    ]
    for settings, arguments, message in cases:
        with pytest.raises(lte_ray.LTEError) as caught:
            prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4)), LTEConfig(num_heads=2, lora_r=2, **settings), **arguments)
        assert message.split(" Did")[0] in str(caught.value)
    with pytest.raises(lte_ray.LTEError, match="prepared for LTE already"):
        prepare_model_for_lte(linear("ddp"), PLAIN)


class Interrupted(nn.Module):
    """Ctrl-C in the middle of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        raise KeyboardInterrupt


@pytest.mark.parametrize("chunk", ["layer", "model"])
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_in_a_forward_pass_leaves_nothing_behind(mode: str, chunk: str) -> None:
    """Afterwards weights are what they are, and this model and others merge and are reset."""
    model = prepare_model_for_lte(Interrupted().double(), PLAIN, mode=mode, chunk=chunk)
    others = [linear(m) for m in MODES]
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 5, dtype=torch.float64))
    assert type(model.linear.weight) is nn.Parameter
    assert torch.equal(model.linear.weight * 2, 2 * model.linear._parameters["weight"])
    for m in (model, *others):
        MergeCondition(m).merge()
        (m.linear if m is model else m[0]).reset_lora_parameters()
        merged_state_dict(m)
    assert others[0](torch.ones(4, 5, dtype=torch.float64)).shape == (4, 4)


def test_merges_inside_of_a_forward_pass_use_the_weight_itself() -> None:
    """Whoever merges while the model runs gets what a merge in between gives."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.merges = nn.Linear(5, 4), False

        def forward(self, x: Tensor) -> Tensor:
            if self.merges:
                MergeCondition(self).merge()
            return self.linear(x)  # type: ignore[no-any-return]

    for mode in MODES:
        torch.manual_seed(0)
        model = prepare_model_for_lte(Merging().double(), PLAIN, mode=mode, seed=SEED)
        shake(model)
        other = copy.deepcopy(model)
        MergeCondition(other).merge()
        model.merges = True
        x = torch.ones(4, 5, dtype=torch.float64)
        assert torch.equal(model(x), other(x))
        assert torch.equal(model.linear.weight, other.linear.weight)


def test_a_prepared_model_inside_of_another() -> None:
    """After the inner one's call the outer one still runs: a weight that it uses without a call is an error."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.linear = [inner], nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x) @ self.linear.weight  # type: ignore[no-any-return]

    model = prepare_model_for_lte(Outer(linear("ddp")).double(), PLAIN)
    with pytest.raises(lte_ray.LTEError, match=r"linear\.weight is used by another module"):
        model(torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_after_a_resume_draws_what_an_uninterrupted_run_draws(mode: str) -> None:
    """The seed and how often A was drawn are in the state dict; one from elsewhere needn't have them."""
    model = linear(mode)
    model[0].reset_lora_parameters()
    torch.manual_seed(5)
    resumed = prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)).double(), PLAIN, mode=mode)
    resumed.load_state_dict(model.state_dict())
    for m in (model, resumed):
        m[0].reset_lora_parameters()
    first, second = factors(model)[0], factors(resumed)[0]
    assert torch.equal(first, second)
    state = {name: value for name, value in linear(mode).state_dict().items() if ".draws." not in name}
    resumed.load_state_dict(state)
    with pytest.raises(lte_ray.LTEError, match="must fit into 64 bits"):
        prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)), PLAIN, mode=mode, seed=2**63)


def twins(mode: str) -> nn.Module:
    """Two layers that share a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).double()
    model[2].weight = model[0].weight
    return prepare_model_for_lte(model, LTEConfig(num_heads=3, lora_r=4, lora_alpha=10.0), mode=mode, seed=SEED)


def test_shared_weights_are_merged_once_and_drawn_alike() -> None:
    """A second merge changes no bit; resets of both layers draw the same A in ddp and in dmp."""
    drawn = []
    for mode in ("ddp", "dmp"):
        model = twins(mode)
        shake(model)
        model[0].merge_parameters()
        weight = model[0].weight.clone()
        model[2].merge_parameters()
        assert torch.equal(model[0].weight, weight)
        for layer in (model[0], model[2]):
            layer.reset_lora_parameters()
        lora = model[0]
        drawn.append([lora.lora_A_weight[h] if mode == "ddp" else lora.lora_A[h].weight for h in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_scalings_that_are_not_exact_in_binary() -> None:
    """16/3 and 16/5 count as they are where a float32 model becomes float64, and as float32 where it becomes bfloat16."""
    lte = LTEConfig(num_heads=2, lora_r=(3, 5), lora_alpha=16.0, adapt=("linear", "conv"), lora_bias="lora")
    for same in (lte, dataclasses.replace(lte, lora_r=3)):
        outputs = []
        for mode in ("ddp", "dmp"):
            torch.manual_seed(0)
            original = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Linear(8, 8))
            model = prepare_model_for_lte(original, same, mode=mode, seed=SEED).double()
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for layer in model:
                    noise = torch.randn(2, layer.specs[0].matrix[0], 5, generator=generator).double()
                    for head, spec in enumerate(layer.specs):
                        b = layer.lora_B_weight[head, :, : spec.rank] if mode == "ddp" else layer.lora_B[head].weight
                        b.copy_(noise[head, :, : spec.rank])
                        layer.lora_bias.lora_B_weight[head] = noise[head, :, :1]
            x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).double()
            outputs.append(model(x))
        # 1e-13: float64; a float32 scaling is off by 1e-8.
        assert_near(outputs[0], outputs[1], 1e-13)
        half = copy.deepcopy(model).to(torch.bfloat16)
        scales = half[0].lora_bias.scales
        assert torch.equal(scales, torch.tensor([s.scaling for s in half[0].specs]))
        assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["ddp", "dmp"])
def test_a_bfloat16_convolution_is_scaled_exactly(mode: str) -> None:
    """255 (1 + 1/256) is 256 in bfloat16, in which the scaling alone would be 1."""
    lte = LTEConfig(num_heads=2, lora_r=1, lora_alpha=1 + 2**-8, lora_bias="frozen")
    model = prepare_model_for_lte(nn.Sequential(nn.Conv1d(1, 1, 1)), lte, mode=mode).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(float("lora_" in name))
    assert model(torch.full((2, 1, 1), 255.0, dtype=torch.bfloat16)).flatten().tolist() == [256.0, 256.0]


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", MODES)
def test_merged_weights_of_wrapped_models_and_under_autocast(mode: str) -> None:
    """DataParallel and torch.compile add nothing to names; autocast rounds nothing, neither there nor in merges."""
    model = prepare("attention", mode)
    shake(model)
    model = model.float()
    expected = copy.deepcopy(model)
    if mode != "mhlora":
        MergeCondition(expected).merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MergeCondition(model).merge()
        state = merged_state_dict(model)
    assert set(state) == set(build("attention").state_dict())
    for wrapped in (expected, nn.DataParallel(expected), torch.compile(expected), torch.compile(nn.DataParallel(expected))):
        other = merged_state_dict(wrapped)
        assert list(other) == list(state)
        assert all(torch.equal(other[name], value) for name, value in state.items())
    assert all(torch.equal(a, b) for a, b in zip(expected.state_dict().values(), model.state_dict().values(), strict=True))


def on_meta(head: int, home: torch.device) -> torch.device:
    """A second device where there is none."""
    return torch.device("meta") if head == 1 else home


def devices(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


def test_statistics_of_adapted_norms_lie_with_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """dmp over two devices: what a head computes with is on its device, also where all of it was moved later."""

    def made() -> nn.Module:
        lte = LTEConfig(num_heads=2, lora_r=2, lora_bias="lora", adapt=("linear", "norm"))
        return prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lte, mode="dmp", strict=False)

    moved = made()
    monkeypatch.setattr(dmp, "head_device", on_meta)
    for model in (made(), moved.float()):
        for layer in model:
            for part in (layer.layers, layer.lora_A, layer.lora_B):
                assert [devices(of_head) for of_head in part] == [{"cpu"}, {"meta"}]
            assert layer.weight.device.type == "cpu"
        norm = model[1]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert [getattr(norm, f"{name}{of}").device.type for of in ("", "_head0", "_head1")] == ["cpu", "cpu", "meta"]
