"""Formats of main weights, compared with theoretical bounds and with NF4 computed from the QLoRA paper."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray.adapters import quantization
from lte_ray.adapters.quantization import FORMATS, QuantizedWeight, check_format, linear
from lte_ray.errors import ConfigError

# QLoRA (arXiv 2305.14314), appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
SHAPES = [(33, 7), (64, 48), (5,), (1, 1), (8, 3, 3, 3), (130, 129)]
CPU = torch.device("cpu")


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    """Each available format."""
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return str(request.param)


@pytest.fixture
def nf4() -> str:
    """Skips without bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    return "nf4"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nf4_by_hand(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the value nearest to each weight with an exact scale of its block of 64, and that scale, in float64."""
    blocks = F.pad(weight.double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, dtype=torch.float64)
    nearest = table[(blocks[..., None] / scale[..., None] - table).abs().argmin(-1)]
    back = [full.flatten()[: weight.numel()].view(weight.shape) for full in (nearest * scale, scale.expand_as(blocks))]
    return back[0], back[1]


# -- values ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(SHAPES), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_bf16_errs_by_half_a_unit_of_its_last_place(shape: tuple[int, ...], size: float, seed: int) -> None:
    """|w - q| <= 2^-8 |w|: 8 bits of mantissa, rounded to nearest."""
    weight = draw(*shape, seed=seed) * size
    error = (QuantizedWeight.from_weight(weight, "bf16").dequantize() - weight).abs()
    assert (error <= 2.0**-8 * weight.abs()).all()


@given(st.sampled_from(SHAPES), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_int8_errs_by_half_a_step_of_its_row(shape: tuple[int, ...], size: float, seed: int) -> None:
    """|w - q| <= step / 2 with step = absmax / 127 of the row, rounded to bf16 (2^-8), and fp32's rounding of w / step."""
    weight = draw(*shape, seed=seed) * size
    rows = weight.view(shape[0] if len(shape) > 1 else 1, -1)
    step = rows.abs().amax(1, keepdim=True) / 127
    error = (QuantizedWeight.from_weight(weight, "int8").dequantize().view(rows.shape) - rows).abs()
    assert (error <= step / 2 * (1 + 2.0**-8) * (1 + 1e-4)).all()


@given(st.sampled_from([*SHAPES, (256, 160)]), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_nf4_errs_as_the_papers_does_but_for_the_scales_8_bits(shape: tuple[int, ...], size: float, seed: int) -> None:
    """|w - q| <= |w - nearest value * scale| + 0.0071 * spread, and fp32's rounding.

    The scales' 8-bit code has values at most 0.0141 apart, for the scales' distances from their mean in units of the
    largest in the group, which is at most `spread`. So a scale errs by at most half of that, and a weight by no more.
    """
    pytest.importorskip("bitsandbytes")
    weight = draw(*shape, seed=seed) * size
    nearest, scales = nf4_by_hand(weight)
    spread = (scales.flatten()[::64] - scales.flatten()[::64].mean()).abs().max()
    error, least = (QuantizedWeight.from_weight(weight, "nf4").dequantize() - weight).abs(), (nearest - weight).abs()
    assert (error <= least + 0.0071 * spread + 1e-5 * scales).all()


def test_the_known_relative_errors_of_normal_weights(form: str) -> None:
    """fp32 0; bf16 2^-8 / sqrt(12) on average over mantissas; int8 of 3-sigma rows 3.3/127/sqrt(12); nf4 0.09 (QLoRA)."""
    error = QuantizedWeight.from_weight(draw(256, 1024), form).load(draw(256, 1024))
    low, high = {"fp32": (0, 0), "bf16": (1e-3, 2.3e-3), "int8": (0.006, 0.009), "nf4": (0.085, 0.097)}[form]
    assert low <= error <= high


def test_what_was_dequantised_is_held_without_error(form: str) -> None:
    """Q(Q(W)) = Q(W) bit for bit, for fp32, bf16 and int8. nf4 keeps its codes; its 8-bit scales change slightly."""
    for shape in SHAPES:
        once = QuantizedWeight.from_weight(draw(*shape), form)
        twice = QuantizedWeight.from_weight(once.dequantize(), form)
        assert torch.equal(once.codes, twice.codes)
        if form != "nf4":
            assert torch.equal(once.dequantize(), twice.dequantize())
            assert once.load(once.dequantize().clone()) == 0.0


def test_other_dtypes_are_the_fp32_values_rounded_once(form: str) -> None:
    """Q(W) is an fp32 weight; float64 represents it exactly, half precisions round it."""
    held = QuantizedWeight.from_weight(draw(64, 48), form)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert held.dequantize(dtype).dtype == dtype
        rounding = torch.finfo(dtype).eps if form == "nf4" else 0.0  # bitsandbytes' kernels may round as they like
        torch.testing.assert_close(held.dequantize(dtype), held.dequantize().to(dtype), rtol=rounding, atol=0)


def test_no_weight_gives_nan(form: str) -> None:
    """Zeros stay zeros; zero rows and blocks, one huge entry, tiny rows, transposed, float64, 1-D and 0-D weights work."""
    zero = QuantizedWeight.from_weight(torch.zeros(70, 33), form)
    assert not zero.dequantize().any()
    assert zero.load(torch.zeros(70, 33)) == 0.0
    odd = draw(128, 64)
    odd[3], odd[7, 5], odd[9] = 0, 1e30, 1e-42
    for weight in (odd, odd.t(), odd.double(), odd[:, ::3], odd[0], odd[0, 0]):
        held = QuantizedWeight.from_weight(weight, form)
        assert held.dequantize().shape == weight.shape
        assert held.dequantize().isfinite().all()
        assert 0 <= held.load(weight) < 0.2
    assert torch.equal(
        QuantizedWeight.from_weight(odd.t(), form).dequantize(),
        QuantizedWeight.from_weight(odd.t().contiguous(), form).dequantize(),
    )
    assert not QuantizedWeight.from_weight(odd, form).dequantize()[3].any()


def test_quantising_is_deterministic(form: str) -> None:
    """The same weight gives the same bits."""
    first, second = (QuantizedWeight.from_weight(draw(130, 129), form).parts for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_empty_weight_and_an_unknown_format_are_refused() -> None:
    """A checked configuration never has them."""
    with pytest.raises(ValueError, match="shape"):
        QuantizedWeight.from_weight(torch.zeros(0, 4), "bf16")
    with pytest.raises(ValueError, match="int4"):
        QuantizedWeight.from_weight(torch.zeros(2, 4), "int4")


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "slack"), [((768, 3072), 0.001), ((256, 128), 0.002), ((64, 48), 0.02)])
def test_memory_against_bf16(form: str, shape: tuple[int, int], slack: float) -> None:
    """Its bytes: nf4 0.258 of bf16's, plus the mean and rounding up; int8 half, plus one step per row."""
    held = QuantizedWeight.from_weight(draw(*shape), form)
    actual = sum(b.untyped_storage().nbytes() for b in held.buffers())
    assert held.nbytes == actual
    rows, columns = shape
    share = {"fp32": 2, "bf16": 1, "int8": 0.5 + 1 / columns, "nf4": (4 + 8 / 64 + 32 / 64 / 256) / 16}[form]
    assert share <= actual / (2 * rows * columns) <= share + slack
    assert form != "nf4" or actual <= 0.27 * 2 * rows * columns


def test_load_keeps_its_memory_and_tells_the_error(form: str) -> None:
    """The same storage, the new weight's values, and ||W - Q(W)|| / ||W||, from float64 as well."""
    held, new = QuantizedWeight.from_weight(draw(33, 7), form), draw(33, 7, seed=1, dtype=torch.float64)
    before = [part.data_ptr() for part in held.parts]
    error = held.load(new)
    assert before == [part.data_ptr() for part in held.parts]
    assert torch.equal(held.dequantize(), QuantizedWeight.from_weight(new, form).dequantize())
    expected = float((new.float() - held.dequantize()).double().norm() / new.norm())
    assert error == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_quantised_weight_never_shares_the_callers_memory(form: str) -> None:
    """Even if the format is the weight's own dtype."""
    weight = draw(4, 4)
    held = QuantizedWeight.from_weight(weight, form)
    before = held.dequantize().clone()
    weight.zero_()
    assert torch.equal(held.dequantize(), before)


# -- as a module -------------------------------------------------------------------------------------------------------


def test_a_change_of_dtype_leaves_it_alone(form: str) -> None:
    """model.double(), half() and to(bfloat16) change only the other layers."""
    model = nn.Sequential(nn.Linear(3, 3), QuantizedWeight.from_weight(draw(64, 48), form))
    before = [part.clone() for part in model[1].parts]
    for change in (nn.Module.double, nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.float64)):
        change(model)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, model[1].parts, strict=True))
    assert model[0].weight.dtype == torch.float64
    assert model.to("meta")[1].device == torch.device("meta")


def test_copies_and_state_dicts_hold_the_same(form: str) -> None:
    """A deepcopy is independent; a state dict can be loaded into another weight of that shape; no parameter is added."""
    held, other = QuantizedWeight.from_weight(draw(33, 7), form), QuantizedWeight.from_weight(draw(33, 7, seed=1), form)
    twin = copy.deepcopy(held)
    other.load_state_dict(held.state_dict())
    held.load(draw(33, 7, seed=2))
    expected = QuantizedWeight.from_weight(draw(33, 7), form).dequantize()
    assert torch.equal(twin.dequantize(), expected)
    assert torch.equal(other.dequantize(), expected)
    assert not list(held.parameters())


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)])
def test_linear_and_its_gradients_are_the_dense_ones(form: str, leading: tuple[int, ...]) -> None:
    """y, dx and db in float64 equal those of F.linear with Q(W), for x of any leading shape; gradcheck passes."""
    held = QuantizedWeight.from_weight(draw(5, 7), form)
    x, bias = (
        draw(*leading, 7, seed=1, dtype=torch.float64).requires_grad_(),
        draw(5, seed=2, dtype=torch.float64).requires_grad_(),
    )
    y, expected = linear(x, held, bias), F.linear(x, held.dequantize(torch.float64), bias)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    dy = draw(*y.shape, seed=3, dtype=torch.float64)
    for actual, dense in zip(torch.autograd.grad(y, (x, bias), dy), torch.autograd.grad(expected, (x, bias), dy), strict=True):
        torch.testing.assert_close(actual, dense, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, b: linear(x, held, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: linear(x, held, None) ** 2, (x,))


def test_nothing_dequantised_is_saved_for_the_backward_pass(form: str) -> None:
    """Autograd saves only the weight's own codes and scales: no copy of Q(W), no x."""
    held = QuantizedWeight.from_weight(draw(256, 128), form)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        linear(draw(9, 128).requires_grad_(), held, draw(256).requires_grad_())
    own = {part.untyped_storage().data_ptr() for part in held.parts}
    assert {t.untyped_storage().data_ptr() for t in saved} == own
    assert sum(t.nbytes for t in saved) == held.nbytes


def test_a_weight_loaded_between_forward_and_backward_is_noticed(form: str) -> None:
    """The gradient would be that of another weight: autograd raises an error instead."""
    held, x = QuantizedWeight.from_weight(draw(5, 7), form), draw(3, 7).requires_grad_()
    y = linear(x, held, None)
    held.load(draw(5, 7, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_inputs_and_biases(form: str, dim: int) -> None:
    """Batched x (any dimension) and bias equal a loop, in the forward and, in both orders, the backward pass."""
    held, x, bias = QuantizedWeight.from_weight(draw(5, 7), form), draw(3, 3, 3, 7, seed=1), draw(3, 5, seed=2)
    y = torch.func.vmap(lambda x, b: linear(x, held, b), in_dims=(dim, 0))(x, bias)
    loop = torch.stack([linear(xi, held, b) for xi, b in zip(x.unbind(dim), bias, strict=True)])
    torch.testing.assert_close(y, loop)

    def loss(x: Tensor, b: Tensor) -> Tensor:
        return linear(x, held, b).sin().sum()

    dense = held.dequantize()
    expected = torch.func.grad(lambda x: F.linear(x.movedim(dim, 0), dense, bias[:, None, None]).sin().sum())(x)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(dim, 0), out_dims=dim)(x, bias)
    torch.testing.assert_close(each, expected)
    whole = torch.func.grad(lambda x: torch.func.vmap(loss, in_dims=(dim, 0))(x, bias).sum())(x)
    torch.testing.assert_close(whole, expected)
    with pytest.raises(NotImplementedError, match="vmap over quantized weights"):
        torch.func.vmap(lambda x, c: quantization._Linear.apply(x, form, held.shape, c, *held.parts[1:]))(
            x[:, 0, 0], torch.stack([held.codes] * 3)
        )


@pytest.mark.parametrize("moved", [False, True])
def test_a_first_use_under_a_transform_leaves_nothing_of_it(form: str, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights share on a device is created with them, or when they move there, not in `torch.func.grad`."""
    shared: dict[torch.device, Tensor] = {}
    monkeypatch.setattr(quantization, "_NESTED_CODES", shared)
    held = QuantizedWeight.from_weight(draw(5, 7), form)
    if moved:
        shared.clear()
        held.to("cpu")
    before = list(shared.values())
    torch.func.grad(lambda x: (x @ held.dequantize().t()).sum())(draw(3, 7))
    assert [id(t) for t in before] == [id(t) for t in shared.values()]
    assert len(before) == (form == "nf4")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(form: str, low: torch.dtype) -> None:
    """As F.linear does: low-precision output and product, gradients in the dtypes of x and b, float64 unchanged."""
    held, x, bias = QuantizedWeight.from_weight(draw(5, 7), form), draw(3, 7).requires_grad_(), draw(5).requires_grad_()
    with torch.autocast("cpu", dtype=low):
        y = linear(x, held, bias)
        assert linear(x.double(), held, None).dtype == torch.float64
    assert y.dtype == low
    torch.testing.assert_close(y, F.linear(x.to(low), held.dequantize(low), bias.to(low)), rtol=2e-2, atol=2e-2)
    dx, db = torch.autograd.grad(y.float().sum(), (x, bias))
    assert dx.dtype == db.dtype == torch.float32
    torch.testing.assert_close(dx, held.dequantize(low).float().sum(0).expand_as(x), rtol=2e-2, atol=2e-2)


def test_a_compiled_model_may_use_it(form: str) -> None:
    """Same values and gradients, in one graph."""
    held, x = QuantizedWeight.from_weight(draw(5, 7), form), draw(3, 7).requires_grad_()
    compiled = torch.compile(lambda x: linear(x.sin(), held, None).cos(), backend="aot_eager", fullgraph=True)
    expected = linear(x.sin(), held, None).cos()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(expected.sum(), x))


# -- what can be had here ----------------------------------------------------------------------------------------------


def test_every_format_works_here(form: str) -> None:
    """On the CPU, with the optional package."""
    check_format(form, CPU)


def test_an_unknown_format_names_the_known_ones() -> None:
    """The error lists the formats."""
    with pytest.raises(ConfigError, match=r"'int4'.*fp32, bf16, int8, nf4"):
        check_format("int4", CPU)


def test_without_the_package_nf4_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other formats need no package."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'lte-ray\[quant\]'.*int8"):
        check_format("nf4", CPU)
    for name in ("fp32", "bf16", "int8"):
        check_format(name, CPU)


def test_a_kernel_that_fails_or_errs_is_found_before_a_run(monkeypatch: pytest.MonkeyPatch, nf4: str) -> None:
    """An exception of the package is an error, and so is an impossible result."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    with pytest.raises(ConfigError, match=r"'nf4' doesn't work on cpu: no kernel image"):
        check_format(nf4, CPU)
    monkeypatch.undo()
    right = quantization.dequantize
    monkeypatch.setattr(quantization, "dequantize", lambda *args: right(*args).flip(0))
    with pytest.raises(ConfigError, match="wrong values on cpu"):
        check_format(nf4, CPU)


@pytest.mark.slow
def test_importing_is_light_and_quiet(nf4: str) -> None:
    """bitsandbytes is imported when nf4 is first used, without printing anything."""
    script = (
        "import sys, torch; from lte_ray.adapters.quantization import check_format\n"
        "check_format('int8', torch.device('cpu')); assert 'bitsandbytes' not in sys.modules\n"
        "check_format('nf4', torch.device('cpu')); assert 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_packages_log_level_is_put_back(nf4: str) -> None:
    """Only its import is silenced."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = log.level
    QuantizedWeight.from_weight(draw(2, 2), nf4)
    assert log.level == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_cpu_does(form: str) -> None:
    """Codes within rounding, the same product and gradient; a model moves there with `.cuda()`."""
    check_format(form, torch.device("cuda"))
    held = QuantizedWeight.from_weight(draw(130, 129), form)
    there, moved = QuantizedWeight.from_weight(draw(130, 129).cuda(), form), copy.deepcopy(held).cuda()
    torch.testing.assert_close(moved.dequantize().cpu(), held.dequantize(), rtol=1e-6, atol=1e-7)
    assert (there.dequantize().cpu() - held.dequantize()).norm() <= 0.02 * held.dequantize().norm()
    x = draw(3, 129)
    here, gpu = x.clone().requires_grad_(), x.cuda().requires_grad_()
    ys = linear(here, held, None), linear(gpu, moved, None)
    torch.testing.assert_close(ys[1].cpu(), ys[0], rtol=1e-3, atol=1e-2)
    dxs = [torch.autograd.grad(y.sum(), x)[0].cpu() for y, x in zip(ys, (here, gpu), strict=True)]
    torch.testing.assert_close(dxs[1], dxs[0], rtol=1e-3, atol=1e-2)
