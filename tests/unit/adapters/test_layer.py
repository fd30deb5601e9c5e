"""One head's linear layer: its formula, its gradients, and the initial A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lte_ray.adapters.factors import Factors, draw_initial_a
from lte_ray.adapters.layer import HeadLayer, add_factors
from lte_ray.adapters.user_parameter import UserParameter, UserParameters
from lte_ray.layout import Adapted
from tests.support.numerics import EPS32, assert_near

sizes = st.integers(1, 7)


def make_layer(out: int, inn: int, rank: int, scaling: float, bias: bool) -> HeadLayer:
    torch.manual_seed(0)
    linear = nn.Linear(inn, out, bias=bias, dtype=torch.float64)
    layer = with_factors(linear, Adapted("w", (out, inn), rank, scaling))
    nn.init.normal_(layer.lte_factors.A)
    nn.init.normal_(layer.lte_factors.B)
    return layer


def with_factors(linear: nn.Linear, spec: Adapted) -> HeadLayer:
    """The layer itself, with factors of its weight; B is zero."""
    return add_factors(linear, {"weight": UserParameter(spec, linear.weight, Factors(spec, linear.weight))}, UserParameters())


@given(sizes, sizes, st.integers(1, 3), st.sampled_from([0.5, 1.0, 128.0]), st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_output_is_that_of_the_dense_weight(
    out: int, inn: int, rank: int, scaling: float, bias: bool, batch: tuple[int, ...]
) -> None:
    """y = x (W~ + s B A)^T + b, with and without bias, whatever the batch dimensions."""
    layer = make_layer(out, inn, rank, scaling, bias)
    x = torch.randn(*batch, inn, dtype=torch.float64)
    expected = x @ (layer.weight + scaling * layer.lte_factors.B @ layer.lte_factors.A).T
    if bias:
        expected = expected + layer.bias
    # 1e-13 is a few hundred float64 epsilons: sums of up to 7 terms, of which some cancel.
    assert_near(layer(x), expected, 1e-13 * scaling)


@given(sizes, sizes, st.integers(1, 3), st.booleans())
def test_gradients_are_those_of_the_dense_formula(out: int, inn: int, rank: int, bias: bool) -> None:
    """With G = dL/dy: dA = s B^T G^T x, dB = s G^T (x A^T), db = sum G, dx = G (W~ + s B A); the main weight gets none."""
    s = 1.5
    layer = make_layer(out, inn, rank, s, bias)
    x = torch.randn(5, inn, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, out, dtype=torch.float64)
    layer(x).backward(g)
    a, b = layer.lte_factors.A.detach(), layer.lte_factors.B.detach()
    assert layer.weight.grad is None
    # 1e-13: sums of at most 7 x 5 float64 terms.
    assert_near(layer.lte_factors.A.grad, s * b.T @ g.T @ x.detach(), 1e-13)
    assert_near(layer.lte_factors.B.grad, s * g.T @ (x.detach() @ a.T), 1e-13)
    assert_near(x.grad, g @ (layer.weight + s * b @ a), 1e-13)
    if bias:
        assert_near(layer.bias.grad, g.sum(0), 1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_gives_the_very_output_of_the_one_it_replaces(bias: bool) -> None:
    """While B = 0 the output is bitwise that of the nn.Linear."""
    linear = nn.Linear(6, 4, bias=bias)
    x = torch.randn(3, 6)
    expected = linear(x)
    layer = with_factors(linear, Adapted("w", (4, 6), 2, 4.0))
    nn.init.normal_(layer.lte_factors.A)
    assert torch.equal(layer(x), expected)


def test_it_takes_over_weight_bias_and_mode() -> None:
    """Weight and bias stay the linear layer's own objects, and are the parameters that it lists; eval mode stays."""
    linear = nn.Linear(6, 4).eval()
    weight, bias = linear.weight, linear.bias
    layer = with_factors(linear, Adapted("w", (4, 6), 2, 4.0))
    assert layer is linear
    assert layer.weight is weight
    assert layer.bias is bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight", "bias"]
    assert not layer.training
    assert "in_features=6, out_features=4, bias=True, rank=2, s=4" in repr(layer)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_a_is_semi_orthogonal(rank: int, more: int, seed: int) -> None:
    """A A^T = (in / r) I."""
    inn = rank + more
    a = draw_initial_a((rank, inn), seed, 0, "layer").double()
    # Householder QR in float32 is orthogonal to about n epsilon.
    assert_near(a @ a.T * rank / inn, torch.eye(rank, dtype=torch.float64), 2 * inn * EPS32)


def test_a_depends_on_seed_head_and_name_alone() -> None:
    """The same (seed, head, name) gives the same A bitwise; changing any one gives another."""
    shape = (3, 8)
    torch.manual_seed(1)
    first = draw_initial_a(shape, 0, 1, "up.weight")
    torch.manual_seed(2)
    assert torch.equal(draw_initial_a(shape, 0, 1, "up.weight"), first)
    for other in ((9, 1, "up.weight"), (0, 2, "up.weight"), (0, 1, "down.weight")):
        assert not torch.allclose(draw_initial_a(shape, *other), first, atol=0.1)


def test_drawing_a_leaves_the_global_generator_alone() -> None:
    """torch's global random state is the same before and after."""
    before = torch.get_rng_state()
    draw_initial_a((3, 8), 0, 1, "up.weight")
    assert torch.equal(torch.get_rng_state(), before)
