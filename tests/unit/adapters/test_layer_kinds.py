"""Every kind of layer with factors, compared with the same layer with the dense weight, in float64.

The dense weight is W_v + s (B A - B' A'), whether the reference A', B' is folded into the head's copy of W or separate.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray.adapters import Converted, convert
from lte_ray.adapters.layer import HeadLayer
from lte_ray.config import LTEConfig
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_stored
from tests.support.numerics import EPS64, assert_near

transformers_utils = pytest.importorskip("transformers.pytorch_utils")

DOUBLE = torch.float64
EVERYTHING = ("linear", "attention", "conv", "embedding", "norm")
Reference = dict[str, tuple[Tensor, Tensor]]

# Sums of at most some hundred terms of size 1 to 10, some of which cancel, in two orders.
TOLERANCE = 2000 * EPS64


@dataclass
class Case:
    """An unconverted layer in float64, an input for it, and a suitable rank."""

    layer: nn.Module
    x: Tensor
    rank: int = 1

    def __repr__(self) -> str:
        return f"{self.layer}, x {tuple(self.x.shape)}, rank {self.rank}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=DOUBLE).to(dtype)


def filled(layer: nn.Module, seed: int) -> nn.Module:
    """Returns the layer in float64 with random parameters, so that no weight is 1 and no bias 0."""
    layer = layer.double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + i))
    return layer


@st.composite
def linears(pick: st.DrawFn) -> Case:
    out, inn, bias = pick(st.integers(1, 7)), pick(st.integers(1, 7)), pick(st.booleans())
    batch = pick(st.sampled_from([(), (3,), (2, 3), (0,), (2, 2, 2)]))
    if pick(st.booleans()):
        layer = nn.Linear(inn, out, bias)
    else:
        layer = transformers_utils.Conv1D(out, inn)
        batch = batch or (1,)  # it needs a batch dimension
    return Case(filled(layer, 1), draw(*batch, inn), pick(st.integers(1, min(out, inn))))


@st.composite
def convolutions(pick: st.DrawFn) -> Case:
    dims = pick(st.integers(1, 3))
    groups = pick(st.integers(1, 3))
    inn = groups * pick(st.integers(1, 3))
    out = groups * pick(st.integers(1, 3))
    kernel = tuple(pick(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(pick(st.integers(1, 2)) for _ in range(dims))
    stride = tuple(pick(st.integers(1, 2)) for _ in range(dims))
    padding = pick(st.sampled_from(["same", "valid", 0, 1, 2]))
    if padding == "same":
        stride = (1,) * dims  # torch has no other
    mode = pick(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = conv(inn, out, kernel, stride, padding, dilation, groups, pick(st.booleans()), mode)
    batch = pick(st.sampled_from([(), (1,), (2,)]))
    size = tuple(pick(st.integers(5, 6)) for _ in range(dims))
    matrix = (out, layer.weight[0].numel())
    return Case(filled(layer, 1), draw(*batch, inn, *size), pick(st.integers(1, min(*matrix, 4))))


@st.composite
def embeddings(pick: st.DrawFn) -> Case:
    words, width = pick(st.integers(2, 9)), pick(st.integers(1, 6))
    padding = pick(st.sampled_from([None, 0, -1]))
    layer = nn.Embedding(words, width, padding)
    shape = pick(st.sampled_from([(5,), (2, 3), ()]))
    return Case(
        filled(layer, 1), torch.randint(0, words, shape, generator=generator(2)), pick(st.integers(1, min(words, width)))
    )


@st.composite
def norms(pick: st.DrawFn) -> Case:
    width, bias = pick(st.integers(2, 6)), pick(st.booleans())
    momentum = pick(st.sampled_from([0.1, 0.5, None]))
    tracks = pick(st.booleans())
    layer, shape = pick(
        st.sampled_from(
            [
                (nn.LayerNorm(width, bias=bias), (2, 3, width)),
                (nn.RMSNorm(width), (3, width)),
                (nn.GroupNorm(2, 2 * width), (2, 2 * width, 3)),
                (nn.BatchNorm1d(width, momentum=momentum, track_running_stats=tracks), (4, width)),
                (nn.BatchNorm1d(width, momentum=momentum), (3, width, 2)),
                (nn.BatchNorm2d(width, momentum=momentum), (2, width, 3, 2)),
                (nn.BatchNorm3d(width, momentum=momentum), (2, width, 2, 2, 2)),
            ]
        )
    )
    return Case(filled(layer, 1).train(pick(st.booleans())), draw(*shape))


CASES = {"linear": linears(), "conv": convolutions(), "embedding": embeddings(), "norm": norms()}


def converted_of(case: Case, bias: str, hold: bool, layer: nn.Module | None = None) -> Converted:
    """Converts a copy of the layer, or `layer`, with random factors; an embedding's padding row stays zero."""
    lte = LTEConfig(num_heads=1, lora_r=case.rank, lora_alpha=1.5 * case.rank, adapt=EVERYTHING, lora_bias=bias)  # type: ignore[arg-type]
    converted = convert(layer or copy.deepcopy(case.layer), lte, separate_reference=hold)
    with torch.no_grad():
        for i, (name, factor) in enumerate(converted.factors.items()):
            factor.copy_(draw(*factor.shape, seed=10 + i))
            if name.endswith("lora_B") and getattr(case.layer, "padding_idx", None) is not None:
                factor[case.layer.padding_idx] = 0
    return converted


def references(converted: Converted, padding: int | None) -> Reference:
    """Returns random A', B' for each main weight."""
    made = {}
    for i, (name, main) in enumerate(converted.main_weights.items()):
        a, b = draw(*main.factors.A.shape, seed=20 + i), draw(*main.factors.B.shape, seed=30 + i)
        if padding is not None:
            b[padding] = 0
        made[name] = (a, b)
    return made


def dense_output(
    case: Case, converted: Converted, reference: Reference, x: Tensor
) -> tuple[Tensor, nn.Module, dict[str, Tensor]]:
    """Runs the unconverted layer with dense weights; returns the output, the layer and the differentiated tensors by name."""
    layer = copy.deepcopy(case.layer)
    leaves = {name: f.detach().clone().requires_grad_() for name, f in converted.factors.items()}
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    for replica in converted.plan.replicas:
        if replica.name in parameters:
            leaves[replica.name] = parameters[replica.name] = parameters[replica.name].clone().requires_grad_()
    for spec in converted.plan.adapted:
        product = leaves[spec.b_name] @ leaves[spec.a_name]
        if spec.name in reference:
            a, b = reference[spec.name]
            product = product - b @ a
        parameters[spec.name] = parameters[spec.name] + as_stored(spec, spec.scaling * product)
    for name, parameter in parameters.items():  # in the place of the parameters
        layer._parameters[name] = parameter  # type: ignore[assignment]
    return layer(x), layer, leaves


def check_against_dense(case: Case, bias: str, hold: bool, with_reference: bool) -> None:
    converted = converted_of(case, bias, hold)
    layer = converted.model
    assert isinstance(layer, HeadLayer)
    reference = references(converted, getattr(case.layer, "padding_idx", None)) if with_reference else {}
    before = {name: p.detach().clone() for name, p in case.layer.named_parameters()}
    for name, main in converted.main_weights.items():
        assert main.load(before[name], reference.get(name)) == 0.0
    xs = [case.x.clone().requires_grad_(case.x.is_floating_point()) for _ in range(2)]
    found = layer(xs[0])
    expected, dense, leaves = dense_output(case, converted, reference, xs[1])
    assert_near(found, expected, TOLERANCE)
    cotangent = draw(*expected.shape, seed=40)
    found.backward(cotangent)
    expected.backward(cotangent)
    parameters = dict(converted.parameters) | converted.factors
    for name, leaf in leaves.items():
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert leaf.grad is not None
        assert_near(gradient, leaf.grad, TOLERANCE)
    for main in converted.main_weights.values():
        assert main.stored.grad is None
    if xs[0].requires_grad:
        assert_near(xs[0].grad, xs[1].grad, TOLERANCE)
    for (name, of_layer), of_dense in zip(
        ((n, b) for n, b in layer.named_buffers() if "lora" not in n), dense.buffers(), strict=True
    ):
        assert_near(of_layer, of_dense, TOLERANCE), name


choices = (st.sampled_from(["replica", "frozen", "lora"]), st.booleans(), st.booleans())


@settings(max_examples=150)
@given(CASES["linear"], *choices)
def test_linear_layers_are_those_of_the_dense_weight(case: Case, bias: str, hold: bool, reference: bool) -> None:
    """Outputs and all gradients of nn.Linear and transformers' Conv1D, with the bias as replica, frozen or factored."""
    check_against_dense(case, bias, hold, reference)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=150)
@given(CASES["conv"], *choices)
def test_convolutions_are_those_of_the_dense_weight(case: Case, bias: str, hold: bool, reference: bool) -> None:
    """1, 2 and 3 dimensions, every stride, padding, padding mode, dilation and number of groups, depthwise ones too."""
    check_against_dense(case, bias, hold, reference)


@settings(max_examples=150)
@given(CASES["embedding"], *choices)
def test_embeddings_are_those_of_the_dense_weight(case: Case, bias: str, hold: bool, reference: bool) -> None:
    """With and without a padding index, whose row gets no gradient."""
    check_against_dense(case, bias, hold, reference)


@settings(max_examples=150)
@given(CASES["norm"], *choices)
def test_norms_are_those_of_the_dense_weight(case: Case, bias: str, hold: bool, reference: bool) -> None:
    """In training and in evaluation; running statistics of batch normalization are updated as before."""
    check_against_dense(case, bias, hold, reference)


# -- examples of each kind ---------------------------------------------------------------------------------------------


class Keyword(nn.Module):
    """Calls its layer with a keyword, as some programs do."""

    def __init__(self, layer: nn.Module, keyword: str) -> None:
        super().__init__()
        self.layer, self.keyword = layer, keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(**{self.keyword: x})


EXAMPLES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: Case(nn.Linear(6, 4), draw(3, 6), 2),
    "Conv1D": lambda: Case(transformers_utils.Conv1D(4, 6), draw(3, 6), 2),
    "Conv1d": lambda: Case(nn.Conv1d(4, 6, 3, padding=1), draw(2, 4, 5), 2),
    "Conv2d": lambda: Case(nn.Conv2d(4, 6, 3, groups=2, padding="same"), draw(2, 4, 5, 5), 2),
    "Conv3d": lambda: Case(nn.Conv3d(4, 6, 2, bias=False, padding_mode="circular", padding=1), draw(2, 4, 3, 3, 3), 2),
    "Embedding": lambda: Case(nn.Embedding(9, 4), torch.tensor([[1, 2], [8, 2]]), 2),
    "LayerNorm": lambda: Case(nn.LayerNorm(4), draw(3, 4)),
    "RMSNorm": lambda: Case(nn.RMSNorm(4), draw(3, 4)),
    "GroupNorm": lambda: Case(nn.GroupNorm(2, 4), draw(3, 4)),
    "BatchNorm1d": lambda: Case(nn.BatchNorm1d(4), draw(3, 4)),
    "BatchNorm2d": lambda: Case(nn.BatchNorm2d(4), draw(3, 4, 2, 2)),
    "BatchNorm3d": lambda: Case(nn.BatchNorm3d(4), draw(3, 4, 2, 2, 2)),
}
KEYWORDS = {"Conv1D": "x", "RMSNorm": "x"}  # all others call their parameter `input`
example = pytest.mark.parametrize("name", EXAMPLES)


def example_case(name: str) -> Case:
    case = EXAMPLES[name]()
    return Case(filled(case.layer, 1), case.x, case.rank)


@example
def test_a_layer_called_with_a_keyword_goes_on_taking_it(name: str) -> None:
    """layer(input=x), or x=x if torch names it so, works as before the conversion."""
    case = example_case(name)
    keyword = KEYWORDS.get(name, "input")
    expected = Keyword(copy.deepcopy(case.layer), keyword)(case.x)
    converted = converted_of(case, "replica", hold=False)
    found = Keyword(converted.model, keyword)(case.x)
    assert torch.equal(found, converted.model(case.x))
    assert not torch.equal(found, expected)  # the factors are random, and they count


@example
def test_hooks_and_attributes_of_a_layer_stay(name: str) -> None:
    """Forward hooks and pre-hooks, with and without keywords, are called; attributes remain."""
    case = example_case(name)
    case.layer.note = "mine"
    calls = []
    case.layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
    case.layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(sorted(kwargs)), with_kwargs=True)
    case.layer.register_forward_hook(lambda module, args, output: 2 * output)
    lte = LTEConfig(num_heads=1, lora_r=case.rank, adapt=EVERYTHING)
    plain = copy.deepcopy(case.layer)
    layer = convert(case.layer, lte).model
    keyword = KEYWORDS.get(name, "input")
    assert torch.equal(layer(**{keyword: case.x}), plain(**{keyword: case.x}))
    assert calls == ["before", [keyword]] * 2
    assert layer.note == "mine"


@example
@pytest.mark.parametrize("hold", [False, True])
def test_a_converted_layer_is_copied_and_pickled(name: str, hold: bool) -> None:
    """Pickles compute the same. A deep copy is a layer of the user's class. They share nothing with the original."""
    case = example_case(name)
    layer = converted_of(case, "lora", hold).model.eval()
    expected = layer(case.x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copied = copy.deepcopy(layer)
    assert type(copied) is layer.plain
    assert_near(copied(case.x), expected, 1e-5)  # float32 sums in another order
    with torch.no_grad():
        copied.weight.zero_()
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(other) is type(layer)
        assert torch.equal(other(case.x), expected)
        with torch.no_grad():
            other.lte_factors.B.zero_()
    assert torch.equal(layer(case.x), expected)


def test_a_converted_layer_is_unpickled_where_none_was_converted_before() -> None:
    """A fresh process finds the classes of torch's layers and of transformers' Conv1D."""
    layers = [converted_of(example_case(name), "replica", hold=False).model for name in ("Conv1D", "Linear", "Conv2d")]
    program = "import pickle, sys; print([type(layer).__name__ for layer in pickle.load(sys.stdin.buffer)])"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(layers), capture_output=True, check=False)
    assert done.stdout.decode().strip() == "['LTEConv1D', 'LTELinear', 'LTEConv2d']", done.stderr.decode()


@example
@pytest.mark.parametrize("hold", [False, True])
def test_every_kind_computes_in_bfloat16_under_autocast(name: str, hold: bool) -> None:
    """Outputs have the plain layer's type and precision; gradients are float32."""
    case = example_case(name)
    x = case.x.float() if case.x.is_floating_point() else case.x
    plain = copy.deepcopy(case.layer).float()
    converted = converted_of(Case(copy.deepcopy(plain), x, case.rank), "lora", hold)
    with torch.autocast("cpu", torch.bfloat16):
        expected_type = plain(x).dtype
        found = converted.model(x)
    assert found.dtype == expected_type
    # bf16 rounds each of the inputs, the hidden values and the sums by 2^-9.
    assert_near(found.float(), converted.model(x), 2.0**-5)
    found.float().square().sum().backward()
    for factor in converted.factors.values():
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert torch.isfinite(factor.grad).all()


@example
@pytest.mark.parametrize("hold", [False, True])
def test_a_new_layer_gives_bitwise_the_output_of_the_plain_one(name: str, hold: bool) -> None:
    """While B = 0, for each kind, also with factored biases."""
    case = example_case(name)
    plain = copy.deepcopy(case.layer)
    lte = LTEConfig(num_heads=1, lora_r=case.rank, adapt=EVERYTHING, lora_bias="lora")
    assert torch.equal(convert(case.layer, lte, separate_reference=hold).model(case.x), plain(case.x))


# -- main weights ------------------------------------------------------------------------------------------------------


@example
@pytest.mark.parametrize("seed", [0, 1])
def test_a_held_reference_computes_what_a_folded_one_does(name: str, seed: int) -> None:
    """W_v with s (B A - B' A'), and W_v - s B' A' with s B A, are the same layer, after each of several loads."""
    case = example_case(name)
    folded, held = (converted_of(case, "lora", hold) for hold in (False, True))
    for version in range(3):
        for weight_name, main in folded.main_weights.items():
            base = draw(*main.spec.shape, seed=100 * seed + version)
            a, b = (draw(*f.shape, seed=100 * seed + 10 * version + i) for i, f in enumerate((main.factors.A, main.factors.B)))
            reference = None if version == 1 else (a, b)  # 1: as after a reset
            main.load(base, reference)
            held.main_weights[weight_name].load(base, reference)
            assert torch.equal(held.main_weights[weight_name].stored, base)
        assert_near(held.model(case.x), folded.model(case.x), TOLERANCE)


def layout_channels_last(weight: Tensor) -> Tensor:
    return weight.to(memory_format=torch.channels_last)


def layout_transposed(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


def layout_strided(weight: Tensor) -> Tensor:
    wide = torch.empty(*weight.shape[:-1], 2 * weight.shape[-1], dtype=weight.dtype)
    wide[..., ::2] = weight
    return wide[..., ::2]


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Conv2d", layout_channels_last),
        ("Conv2d", layout_transposed),
        ("Linear", layout_transposed),
        ("Linear", layout_strided),
        ("Conv1D", layout_transposed),
        ("Conv1D", layout_strided),
        ("Embedding", layout_transposed),
    ],
)
def test_main_weights_of_any_layout_and_type_take_over_a_base(
    name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, hold: bool
) -> None:
    """W_v - s B' A', computed in the base's float64 and rounded once; the weight keeps its memory layout."""
    case = example_case(name)
    case.layer.weight = nn.Parameter(layout(case.layer.weight.detach().to(dtype)))
    strides = case.layer.weight.stride()
    converted = converted_of(case, "replica", hold, case.layer)  # a deep copy would have another layout
    main, spec = converted.main_weights["weight"], converted.plan.adapted[0]
    base = draw(*spec.shape, seed=1)
    a, b = draw(*main.factors.A.shape, seed=2), draw(*main.factors.B.shape, seed=3)
    main.load(base, (a, b))
    expected = base if hold else base - as_stored(spec, spec.scaling * b @ a)
    assert converted.model.weight.stride() == strides
    # float64 sums of two terms; then one rounding, by half a unit in the last place
    assert_near(converted.model.weight, expected, 10 * EPS64 + torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("stored", [True, False])
def test_the_matrix_of_a_weight_is_out_by_in(stored: bool) -> None:
    """As a matrix a convolution's weight is out x (in/groups k), transformers' Conv1D's is transposed, a vector's d x 1."""
    shapes = {"Conv2d": (6, 18), "Conv1D": (4, 6), "Linear": (4, 6), "Embedding": (9, 4), "LayerNorm": (4, 1)}
    for name, matrix in shapes.items():
        spec: Adapted = converted_of(example_case(name), "frozen", stored).plan.adapted[0]
        assert spec.matrix == matrix
        assert as_stored(spec, torch.zeros(matrix)).shape == spec.shape


# -- what isn't a kind -------------------------------------------------------------------------------------------------


def test_a_layer_with_a_forward_of_its_own_is_left_alone() -> None:
    """A forward that a program assigned to the instance still runs, and the weight trains as a replica."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[0].forward = lambda x: 2 * nn.functional.linear(x, model[0].weight)  # type: ignore[method-assign]
    x = draw(2, 4)
    expected = model(x)
    converted = convert(model, LTEConfig(num_heads=1, lora_r=2))
    assert [a.name for a in converted.plan.adapted] == ["1.weight"]
    assert torch.equal(converted.model(x), expected)
    converted.model(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_whose_gradient_is_no_products_is_a_replica(options: dict[str, object]) -> None:
    """max_norm modifies the weight; scale_grad_by_freq divides its gradients row by row. Both train as before."""
    model = nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 4)).double()  # type: ignore[arg-type]
    plain, words = copy.deepcopy(model), torch.tensor([1, 1, 3])
    converted = convert(model, LTEConfig(num_heads=1, lora_r=2, adapt=("linear", "embedding")))
    assert "0.weight" in [r.name for r in converted.plan.replicas]
    for each in (plain, converted.model):
        each(words).square().sum().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
