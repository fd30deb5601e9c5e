"""MultiheadAttention of linear layers against nn.MultiheadAttention: outputs, weights, gradients, and conversion."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lte_ray.errors import ConfigError
from lte_ray.misc import MultiheadAttention, use_custom_attention

WIDTH, HEADS = 12, 3
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of at most a few dozen terms of order 1, in another order


class AddsFlipped(nn.Linear):
    """Stands for an adapted layer: it adds something to what nn.Linear computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(-1))


def torch_attention(seed: int = 0, **settings: Any) -> nn.MultiheadAttention:
    """nn.MultiheadAttention in float64, with biases that aren't zero."""
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, "dtype": torch.float64, **settings})
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def compare(expected: nn.Module, actual: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], **call: Any) -> None:
    """Asserts that outputs, attention weights, and gradients of inputs and of all parameters are equal."""
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
    packed = pack(named_a, list(named_e))
    assert packed.keys() == named_e.keys()
    for name, gradient in named_e.items():
        assert_close(packed[name], gradient, **TIGHT)


def pack(named: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Our gradients under nn.MultiheadAttention's names; three are concatenated where its parameter is packed."""
    result = {}
    for name in names:
        our_name = name.replace("_proj_weight", "_proj.weight").replace("in_proj_bias", "in_proj.bias")
        if name in named:
            result[name] = named[name]
        elif our_name in named:
            result[name] = named[our_name]
        else:
            result[name] = torch.cat([named[our_name.replace("in_proj", f"{x}_proj")] for x in "qkv"])
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
@given(data=st.data())
def test_any_call_equals_torchs(kind: str, split: bool, data: st.DataObject) -> None:
    """Any masks, shapes, orders, identities of inputs, and flags, in training and in eval mode: equal to 1e-12."""
    batch, length, keys = (data.draw(st.integers(1, 4), n) for n in ("batch", "length", "keys"))
    batched, batch_first, need_weights, average, train = (
        data.draw(st.booleans(), n) for n in ("batched", "first", "w", "a", "t")
    )
    expected = torch_attention(**KINDS[kind], batch_first=batch_first).train(train)
    actual = MultiheadAttention.from_torch(expected, split_qkv=split)

    def draw_input(size: int, width: int, seed: int) -> Tensor:
        shape = (size, width) if not batched else (batch, size, width) if batch_first else (size, batch, width)
        return draw(*shape, seed=seed)

    same_widths = expected.kdim == expected.vdim == WIDTH
    pattern = data.draw(st.sampled_from(["qqq", "qkk", "qkv", "qqk", "qkq"] if same_widths else ["qkv"]), "pattern")
    if "qq" in pattern or pattern == "qkq":
        keys = length
    tensors = {
        "q": draw_input(length, WIDTH, 1),
        "k": draw_input(keys, expected.kdim, 2),
        "v": draw_input(keys, expected.vdim, 3),
    }
    inputs = tuple(tensors[letter] for letter in pattern)

    samples = batch if batched else 1
    kind_of_mask = data.draw(st.sampled_from(["none", "2d", "3d"]), "mask")
    floats = data.draw(st.booleans(), "float masks")
    mask = padding = None
    if kind_of_mask != "none":
        shape = (length, keys) if kind_of_mask == "2d" else (samples * HEADS, length, keys)
        mask = draw(*shape, seed=4).detach()
    if data.draw(st.booleans(), "padding"):
        padding = draw(*((samples, keys) if batched else (keys,)), seed=5).detach()
    if not floats:  # no mask hides the first key: a row with all keys hidden gives NaN
        mask, padding = (None if m is None else m > 0.3 for m in (mask, padding))
        for m in (mask, padding):
            if m is not None:
                m[..., 0] = False
    call = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights, "average_attn_weights": average}
    compare(expected, actual, inputs, **call)


@pytest.mark.parametrize(("need_weights", "padded"), list(product([False, True], repeat=2)))
def test_the_causal_hint_changes_nothing(need_weights: bool, padded: bool) -> None:
    """With the causal mask, is_causal=True gives what torch gives, on the fast path and on the other."""
    expected, x = torch_attention(), draw(2, 4, WIDTH)
    call: dict[str, Any] = {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "is_causal": True}
    call["key_padding_mask"] = torch.tensor([[False] * 4, [False, True, False, False]]) if padded else None
    compare(expected, MultiheadAttention.from_torch(expected), (x, x, x), need_weights=need_weights, **call)


def test_the_causal_hint_never_hides_an_added_key() -> None:
    """With add_zero_attn the result is that of the mask without the hint."""
    attention, x = MultiheadAttention.from_torch(torch_attention(add_zero_attn=True)), draw(2, 4, WIDTH)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    with_hint = attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert_close(with_hint, attention(x, x, x, attn_mask=mask, need_weights=True)[0], **TIGHT)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_in_training_only_and_draws_as_torch_does(need_weights: bool) -> None:
    """In training it equals torch's under the same seed; in eval mode it has no effect."""
    expected, x = torch_attention(dropout=0.5), draw(2, 5, WIDTH)
    actual = MultiheadAttention.from_torch(expected)
    outputs = []
    for attention in (expected, actual):
        torch.manual_seed(3)
        outputs.append(attention(x, x, x, need_weights=need_weights)[0])
    assert_close(outputs[1], outputs[0], **TIGHT)
    without_dropout = MultiheadAttention.from_torch(torch_attention())(x, x, x)[0]
    assert not torch.allclose(outputs[1], without_dropout)
    assert_close(actual.eval()(x, x, x, need_weights=need_weights)[0], without_dropout, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_object_is_kept(kind: str) -> None:
    """Without split_qkv, nothing is copied, so an optimizer keeps the model's parameters."""
    expected = torch_attention(**KINDS[kind])
    ours = MultiheadAttention.from_torch(expected)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in expected.parameters()}
    if "kdim" not in KINDS[kind]:
        assert ours.in_proj.weight is expected.in_proj_weight
        assert ours.in_proj.bias is expected.in_proj_bias
    assert ours.out_proj.weight is expected.out_proj.weight
    assert type(ours.out_proj) is nn.Linear


def test_split_without_packed_bias_keeps_the_separate_weights() -> None:
    """If the weights are separate already, split_qkv keeps their objects and copies only the bias."""
    expected = torch_attention(kdim=5, vdim=7)
    ours = MultiheadAttention.from_torch(expected, split_qkv=True)
    assert ours.k_proj.weight is expected.k_proj_weight
    assert ours.in_proj_bias is None
    assert torch.equal(ours.v_proj.bias, expected.in_proj_bias[2 * WIDTH :])


@pytest.mark.parametrize("split", [False, True])
def test_mode_type_and_what_trains_are_kept(split: bool) -> None:
    """The new module has eval mode, bfloat16, and frozen parameters of the old one; no random number is drawn."""
    expected = torch_attention(dtype=torch.bfloat16).eval()
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
    """Constructed under the same seed, both compute the same, split or not."""
    torch.manual_seed(5)
    expected = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **widths)
    torch.manual_seed(5)
    ours = MultiheadAttention(WIDTH, HEADS, split_qkv=split, dtype=torch.float64, **widths)
    assert all(isinstance(layer, nn.Linear) for layer in ours.children())
    assert ours.in_proj_bias is None  # each projection has its own
    q, k, v = draw(2, 3, WIDTH), draw(2, 4, widths.get("kdim", WIDTH)), draw(2, 4, widths.get("vdim", WIDTH))
    compare(expected, ours, (q, k, v))


@pytest.mark.parametrize(("split", "names"), [(False, ["in_proj"]), (True, ["q_proj", "k_proj", "v_proj"])])
def test_what_an_adapted_layer_adds_counts(split: bool, names: list[str]) -> None:
    """Layers whose class changes in place are called: W x + W flip(x) is attention with W (1 + flip)."""
    expected = torch_attention(bias=False)
    ours = MultiheadAttention.from_torch(copy.deepcopy(expected), split_qkv=split)
    for name in [*names, "out_proj"]:
        getattr(ours, name).__class__ = AddsFlipped
    with torch.no_grad():
        for weight in (expected.in_proj_weight, expected.out_proj.weight):
            weight.add_(weight.flip(1))
    x, y, z = draw(2, 3, WIDTH), draw(2, 3, WIDTH, seed=1), draw(2, 3, WIDTH, seed=2)
    for inputs in ((x, x, x), (x, y, y), (x, y, z), (x, y, x)):
        assert_close(ours(*inputs)[0], expected(*inputs)[0], **TIGHT)


def test_projections_see_samples_first() -> None:
    """Also with batch_first=False, so that an adapted layer can split samples along the first dimension."""
    shapes = []
    attention = MultiheadAttention(WIDTH, HEADS, batch_first=False)
    for layer in (attention.in_proj, attention.out_proj):
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    attention(*[torch.randn(5, 2, WIDTH)] * 3)
    assert shapes == [(2, 5), (2, 5)]


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
@pytest.mark.parametrize(
    ("train", "grad", "by_hand"), [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
)
@pytest.mark.parametrize("kind", ["layer", "decoder", "encoder", "transformer"])
def test_inside_torchs_transformers(kind: str, train: bool, grad: bool, by_hand: bool) -> None:
    """Outputs stay the same in both modes, with and without padding, also where torch takes its fast path."""
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
        kept = slice(None) if mask is None or two else ~padding  # the fast path leaves zeros in padded positions
        assert_close(actual[kept], expected[kept], **TIGHT)
    assert len(calls) == 2 * sum(isinstance(m, MultiheadAttention) for m in ours.modules())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_an_encoder_can_be_built_from_a_converted_layer() -> None:
    """nn.TransformerEncoder clones the layer and turns nested tensors off."""
    layer = use_custom_attention(layers()["layer"])
    encoder = nn.TransformerEncoder(layer, 2)
    assert not encoder.use_nested_tensor
    assert len({id(x.self_attn) for x in encoder.layers}) == 2


def test_copies_and_pickles_compute_the_same() -> None:
    """Bitwise."""
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


def test_wrong_arguments_are_one_clear_error() -> None:
    """Constructor and call name what is wrong and what is expected."""
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
