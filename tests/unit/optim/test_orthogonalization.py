"""The matrix sign against the singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte_ray.optim import orthogonalize
from lte_ray.optim.orthogonalization import COEFFICIENTS, NOISE


def draw(m: int, n: int, singular_values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U S V^T, U, V) in float64 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(singular_values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(singular_values), generator=generator, dtype=torch.float64)).Q
    return (u * singular_values) @ v.T, u, v


def test_the_polynomials_take_all_singular_values_to_one() -> None:
    """From a thousandth to 1 and slightly above, to within 1e-5."""
    x = torch.logspace(-3, 0.004, 10_000, dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert float((x - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
@pytest.mark.parametrize(("m", "n"), [(64, 8), (8, 64), (24, 24), (40, 1), (1, 1)])
def test_the_sign_of_a_matrix_is_that_of_its_svd(m: int, n: int, scale: float, dtype: torch.dtype) -> None:
    """U V^T, however large or small the matrix is, for singular values within a factor of 10."""
    matrix, u, v = draw(m, n, torch.logspace(0, -1, min(m, n), dtype=torch.float64))
    torch.testing.assert_close(orthogonalize((matrix * scale).to(dtype)).double(), u @ v.T, rtol=0, atol=2e-4)


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-12])
def test_small_singular_values_are_damped_not_amplified(smallest: float) -> None:
    """In float32 too, singular values s become s / sqrt(s^2 + d): rounding errors in their square don't blow up."""
    s = torch.logspace(0, float(torch.tensor(smallest).log10()), 48, dtype=torch.float64)
    matrix, u, v = draw(256, 48, s)
    sign = orthogonalize(matrix.float()).double()
    damped = s / (s.square() + NOISE * s.pow(4).sum().sqrt()).sqrt()
    torch.testing.assert_close((u.T @ sign @ v).diagonal(), damped, rtol=0, atol=0.02)
    assert float(torch.linalg.svdvals(sign)[0]) < 1.001


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_low_rank_stays_of_that_rank(rank: int) -> None:
    """Zero stays zero; singular values that are zero stay so to within 1e-3."""
    matrix, u, v = draw(32, 16, torch.ones(rank, dtype=torch.float64))
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), u @ v.T, rtol=0, atol=1e-3)


def test_a_batch_is_its_matrices() -> None:
    """Any number of leading dimensions, also for wide matrices."""
    batch = torch.randn(2, 3, 5, 9, generator=torch.Generator().manual_seed(1))
    signs = orthogonalize(batch)
    assert signs.shape == batch.shape
    torch.testing.assert_close(signs[1, 2], orthogonalize(batch[1, 2]), rtol=0, atol=1e-5)


def test_infinities_are_not_hidden() -> None:
    """They become NaN, as with other optimizers, so that the head's checks see them."""
    assert orthogonalize(torch.tensor([[1.0, float("inf")], [0.0, 1.0]])).isnan().any()
