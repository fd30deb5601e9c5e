"""MultiheadAttention of linear layers against nn.MultiheadAttention: outputs, weights, gradients, and what survives."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lte_ray.errors import ConfigError
from lte_ray.misc import MultiheadAttention, use_custom_attention

WIDTH, HEADS = 12, 3
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of at most a few dozen terms of order 1, in another order


class Nudged(nn.Linear):
    """Stands for an adapted layer: what it adds must arrive."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(-1))


def theirs(seed: int = 0, **settings: Any) -> nn.MultiheadAttention:
    """In float64, with biases that aren't zero."""
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, "dtype": torch.float64, **settings})
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def compare(expected: nn.Module, actual: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], **call: Any) -> None:
    """Outputs, weights, and gradients of inputs and of all parameters (in their original order) are equal."""
    distinct = list({id(x): x for x in inputs}.values())
    results = []
    for attention in (expected, actual):
        output, weights = attention(*inputs, **call)
        assert (weights is not None) == call.get("need_weights", True)
        loss = output.sin().sum() + (0 if weights is None else weights.cos().sum())
        wanted = [*distinct, *attention.parameters()]
        grads = torch.autograd.grad(loss, wanted)
        named = dict(zip([n for n, _ in attention.named_parameters()], grads[len(distinct) :], strict=True))
        results.append((output, weights, grads[: len(distinct)], named))
    (output_e, weights_e, inputs_e, named_e), (output_a, weights_a, inputs_a, named_a) = results
    assert_close(output_a, output_e, **TIGHT)
    if weights_e is not None:
        assert_close(weights_a, weights_e, **TIGHT)
    for a, e in zip(inputs_a, inputs_e, strict=True):
        assert_close(a, e, **TIGHT)
    packed = packed_like(named_a, list(named_e))
    assert packed.keys() == named_e.keys()
    for name, gradient in named_e.items():
        assert_close(packed[name], gradient, **TIGHT)


def packed_like(named: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Ours under the names of nn.MultiheadAttention, three parts put together where those are packed."""
    result = {}
    for name in names:
        own = name.replace("_proj_weight", "_proj.weight").replace("in_proj_bias", "in_proj.bias")
        if name in named:
            result[name] = named[name]
        elif own in named:
            result[name] = named[own]
        else:
            result[name] = torch.cat([named[own.replace("in_proj", f"{x}_proj")] for x in "qkv"])
    return result


KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "other widths": {"kdim": 5, "vdim": 7},
    "everything": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_equals_torchs(kind: str, split: bool, data: st.DataObject) -> None:
    """Any masks, shapes, orders, identities of inputs and flags, in training and in eval mode: equal to 1e-12."""
    batch, length, keys = (data.draw(st.integers(1, 4), n) for n in ("batch", "length", "keys"))
    batched, batch_first, need_weights, average, train = (
        data.draw(st.booleans(), n) for n in ("batched", "first", "w", "a", "t")
    )
    expected = theirs(**KINDS[kind], batch_first=batch_first).train(train)
    actual = MultiheadAttention.from_torch(expected, split_qkv=split)

    def drawn(size: int, width: int, seed: int) -> Tensor:
        shape = (size, width) if not batched else (batch, size, width) if batch_first else (size, batch, width)
        return draw(*shape, seed=seed)

    same_widths = expected.kdim == expected.vdim == WIDTH
    pattern = data.draw(st.sampled_from(["qqq", "qkk", "qkv", "qqk", "qkq"] if same_widths else ["qkv"]), "pattern")
    if "qq" in pattern or pattern == "qkq":
        keys = length
    made = {"q": drawn(length, WIDTH, 1), "k": drawn(keys, expected.kdim, 2), "v": drawn(keys, expected.vdim, 3)}
    inputs = tuple(made[letter] for letter in pattern)

    samples = batch if batched else 1
    kind_of_mask = data.draw(st.sampled_from(["none", "2d", "3d"]), "mask")
    floats = data.draw(st.booleans(), "float masks")
    mask = padding = None
    if kind_of_mask != "none":
        shape = (length, keys) if kind_of_mask == "2d" else (samples * HEADS, length, keys)
        mask = draw(*shape, seed=4).detach()
    if data.draw(st.booleans(), "padding"):
        padding = draw(*((samples, keys) if batched else (keys,)), seed=5).detach()
    if not floats:  # one key is left to everyone: a row with all keys hidden is not a number
        mask, padding = (None if m is None else m > 0.3 for m in (mask, padding))
        for m in (mask, padding):
            if m is not None:
                m[..., 0] = False
    call = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights, "average_attn_weights": average}
    compare(expected, actual, inputs, **call)


@pytest.mark.parametrize(("need_weights", "padded"), list(product([False, True], repeat=2)))
def test_the_causal_hint_changes_nothing(need_weights: bool, padded: bool) -> None:
    """With the causal mask, is_causal=True gives what torch gives, whichever path is taken."""
    expected, x = theirs(), draw(2, 4, WIDTH)
    call: dict[str, Any] = {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "is_causal": True}
    call["key_padding_mask"] = torch.tensor([[False] * 4, [False, True, False, False]]) if padded else None
    compare(expected, MultiheadAttention.from_torch(expected), (x, x, x), need_weights=need_weights, **call)


def test_the_causal_hint_never_hides_an_added_key() -> None:
    """With add_zero_attn the mask decides, as it does without the hint."""
    attention, x = MultiheadAttention.from_torch(theirs(add_zero_attn=True)), draw(2, 4, WIDTH)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    with_hint = attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert_close(with_hint, attention(x, x, x, attn_mask=mask, need_weights=True)[0], **TIGHT)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_in_training_only_and_draws_as_torch_does(need_weights: bool) -> None:
    """Equal to torch under the same seed in training; without effect in eval mode."""
    expected, x = theirs(dropout=0.5), draw(2, 5, WIDTH)
    actual = MultiheadAttention.from_torch(expected)
    outputs = []
    for attention in (expected, actual):
        torch.manual_seed(3)
        outputs.append(attention(x, x, x, need_weights=need_weights)[0])
    assert_close(outputs[1], outputs[0], **TIGHT)
    still = MultiheadAttention.from_torch(theirs())(x, x, x)[0]
    assert not torch.allclose(outputs[1], still)
    assert_close(actual.eval()(x, x, x, need_weights=need_weights)[0], still, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_object_survives(kind: str) -> None:
    """Without split_qkv, nothing is copied, so an optimizer's parameters are still those of the model."""
    expected = theirs(**KINDS[kind])
    ours = MultiheadAttention.from_torch(expected)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in expected.parameters()}
    if "kdim" not in KINDS[kind]:
        assert ours.in_proj.weight is expected.in_proj_weight
        assert ours.in_proj.bias is expected.in_proj_bias
    assert ours.out_proj.weight is expected.out_proj.weight
    assert type(ours.out_proj) is nn.Linear


def test_split_without_packed_bias_keeps_the_separate_weights() -> None:
    """Asked to split a module whose weights are separate already, the weights stay objects and only the bias is copied."""
    expected = theirs(kdim=5, vdim=7)
    ours = MultiheadAttention.from_torch(expected, split_qkv=True)
    assert ours.k_proj.weight is expected.k_proj_weight
    assert ours.in_proj_bias is None
    assert torch.equal(ours.v_proj.bias, expected.in_proj_bias[2 * WIDTH :])


@pytest.mark.parametrize("split", [False, True])
def test_mode_type_and_what_trains_are_kept(split: bool) -> None:
    """Eval mode, bfloat16 and frozen parameters arrive in the new module and its layers; no random number is drawn."""
    expected = theirs(dtype=torch.bfloat16).eval()
    expected.in_proj_weight.requires_grad_(False)
    state = torch.get_rng_state()
    ours = MultiheadAttention.from_torch(expected, split_qkv=split)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in ours.modules())
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == ({"q_proj.weight", "k_proj.weight", "v_proj.weight"} if split else {"in_proj.weight"})


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}])
def test_the_same_seed_gives_torchs_initial_weights(split: bool, widths: dict[str, int]) -> None:
    """Constructed under one seed, both are the same function, split or not."""
    torch.manual_seed(5)
    expected = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **widths)
    torch.manual_seed(5)
    ours = MultiheadAttention(WIDTH, HEADS, split_qkv=split, dtype=torch.float64, **widths)
    assert all(isinstance(layer, nn.Linear) for layer in ours.children())
    assert ours.in_proj_bias is None  # each projection has its own
    q, k, v = draw(2, 3, WIDTH), draw(2, 4, widths.get("kdim", WIDTH)), draw(2, 4, widths.get("vdim", WIDTH))
    compare(expected, ours, (q, k, v))


@pytest.mark.parametrize(("split", "names"), [(False, ["in_proj"]), (True, ["q_proj", "k_proj", "v_proj"])])
def test_what_an_adapted_layer_adds_arrives(split: bool, names: list[str]) -> None:
    """Layers that change class in place, or are replaced, compute: W x + W flip(x) is attention with W (1 + flip)."""
    expected = theirs(bias=False)
    ours = MultiheadAttention.from_torch(copy.deepcopy(expected), split_qkv=split)
    for name in [*names, "out_proj"]:
        getattr(ours, name).__class__ = Nudged
    with torch.no_grad():
        for weight in (expected.in_proj_weight, expected.out_proj.weight):
            weight.add_(weight.flip(1))
    x, y, z = draw(2, 3, WIDTH), draw(2, 3, WIDTH, seed=1), draw(2, 3, WIDTH, seed=2)
    for inputs in ((x, x, x), (x, y, y), (x, y, z), (x, y, x)):
        assert_close(ours(*inputs)[0], expected(*inputs)[0], **TIGHT)


def test_projections_see_samples_first() -> None:
    """Also with batch_first=False, so that an adapted layer can share out samples by its first dimension."""
    seen = []
    attention = MultiheadAttention(WIDTH, HEADS, batch_first=False)
    for layer in (attention.in_proj, attention.out_proj):
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    attention(*[torch.randn(5, 2, WIDTH)] * 3)
    assert seen == [(2, 5), (2, 5)]


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    common = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, **common)
    return {
        "layer": encoder,
        "decoder": nn.TransformerDecoderLayer(WIDTH, 2, **common),
        "encoder": nn.TransformerEncoder(encoder, 2, enable_nested_tensor=True),
        "transformer": nn.Transformer(WIDTH, 2, 1, 1, **common),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", ["layer", "decoder", "encoder", "transformer"])
def test_inside_torchs_transformers(kind: str, train: bool, grad: bool, by_hand: bool) -> None:
    """Outputs stay in both modes, with padding and without, where torch would take its fast path and nested tensors."""
    model = layers()[kind].train(train)
    ours = copy.deepcopy(model)
    if by_hand:
        for module in list(ours.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.MultiheadAttention:
                    setattr(module, name, MultiheadAttention.from_torch(child))
    else:
        use_custom_attention(ours)
    calls = []
    for module in ours.modules():
        if isinstance(module, MultiheadAttention):
            module.out_proj.register_forward_hook(lambda *_: calls.append(1))
    x, y = draw(2, 4, WIDTH), draw(2, 4, WIDTH, seed=1)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    two = kind in ("decoder", "transformer")
    for mask in (None, padding):
        sides = {"decoder": ["tgt"], "transformer": ["src", "memory"]}.get(kind, ["src"])
        keyword = {} if mask is None else {f"{side}_key_padding_mask": mask for side in sides}
        with torch.set_grad_enabled(grad):
            expected, actual = (m(*((x, y) if two else (x,)), **keyword) for m in (model, ours))
        seen = slice(None) if mask is None or two else ~padding  # the fast path leaves zeros where nothing is to be seen
        assert_close(actual[seen], expected[seen], **TIGHT)
    assert len(calls) == 2 * sum(isinstance(m, MultiheadAttention) for m in ours.modules())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_an_encoder_can_be_built_from_a_converted_layer() -> None:
    """nn.TransformerEncoder clones it and turns nested tensors off by itself."""
    layer = use_custom_attention(layers()["layer"])
    encoder = nn.TransformerEncoder(layer, 2)
    assert not encoder.use_nested_tensor
    assert len({id(x.self_attn) for x in encoder.layers}) == 2


def test_it_survives_copying_and_pickling() -> None:
    """A copy and an unpickled module compute the same, bitwise."""
    attention, x = MultiheadAttention(WIDTH, HEADS), torch.randn(2, 3, WIDTH)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x, x, x)[0], attention(x, x, x)[0])


def test_it_works_under_autocast() -> None:
    """In bfloat16 with a float32 mask, near the float32 output (8 bits of mantissa, a few roundings: 3e-2)."""
    torch.manual_seed(0)
    attention, x = MultiheadAttention(WIDTH, HEADS), torch.randn(2, 3, WIDTH)
    mask = torch.randn(3, 3)
    for need_weights in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        assert output.dtype == torch.bfloat16
        assert_close(output, attention(x, x, x, attn_mask=mask)[0], rtol=3e-2, atol=3e-2, check_dtype=False)


def test_what_cannot_be_is_one_clear_error() -> None:
    """Constructor and call name what doesn't fit and what would."""
    with pytest.raises(ConfigError, match="num_heads = 5; change one of them"):
        MultiheadAttention(12, 5)
    with pytest.raises(ConfigError, match="dropout = 2 isn't a probability"):
        MultiheadAttention(12, 3, dropout=2)
    attention, x = MultiheadAttention(WIDTH, HEADS), torch.randn(2, 3, WIDTH)
    for inputs in ((x, x[0], x), (x, x, x[:, :1]), (x, x[:1], x[:1]), (x[..., :5], x, x), (x[None], x[None], x[None])):
        with pytest.raises(ConfigError, match="query, key and value have shapes"):
            attention(*inputs)
    with pytest.raises(ConfigError, match="pass the causal mask as attn_mask too"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(ConfigError, match=r"attn_mask has shape \(2, 2\); these inputs need \(queries, keys\) = \(3, 3\)"):
        attention(x, x, x, attn_mask=torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"key_padding_mask has shape \(3, 2\)"):
        attention(x, x, x, key_padding_mask=torch.zeros(3, 2))
    with pytest.raises(ConfigError, match=r"attn_mask has type torch\.int64"):
        attention(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.long))
