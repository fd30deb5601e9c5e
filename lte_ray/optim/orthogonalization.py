"""Orthogonalization: the matrix sign of a matrix, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_ray.optim.precision import exact_products

COEFFICIENTS = (
    (8.23731, -23.1577, 16.6806),
    (4.08191, -2.89291, 0.525304),
    (3.92239, -2.85382, 0.531992),
    (3.27766, -2.40953, 0.484653),
    (2.27107, -1.61383, 0.397846),
    (1.8719, -1.22997, 0.358444),
    (1.875, -1.25, 0.375),
)
"""(a, b, c) of the polynomials a x + b x^3 + c x^5, one an iteration, that take every x from 1e-3 to 1 to within 1e-5 of 1.

All but the last are the minimax polynomials of Polar Express (arXiv 2505.16932, algorithm 1) for singular values of at least
1e-3, with its safety factor 1.01 and its cushion 0.02. The last is the Newton-Schulz polynomial.
"""

NOISE = 1e-6
"""Squares of singular values, relative to the largest, below which float32 can't tell them from rounding."""


def orthogonalize(x: Tensor) -> Tensor:
    """Returns the matrix sign of x (... x m x n): U V^T, where x = U S V^T.

    Singular values below a thousandth of the largest are nearly rounding errors. They become s / sqrt(s^2 + d) with a d of
    `NOISE` times the norm of the Gram matrix, so a zero matrix stays zero.
    """
    if x.shape[-2] < x.shape[-1]:
        return orthogonalize(x.mT).mT
    x = scale_to_one(x)
    with exact_products(x.device.type):
        return x @ inverse_square_root(x.mT @ x)


def scale_to_one(x: Tensor) -> Tensor:
    """Divides each matrix by its largest absolute value, which has no influence on its sign, so that no square underflows."""
    return x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def inverse_square_root(gram: Tensor) -> Tensor:
    """Returns (K + d I)^(-1/2) of Gram matrices K = X^T X (... x n x n), so that X times it is the matrix sign of X.

    d is `NOISE` times the Frobenius norm of K. Each iteration would replace X by X P, P = a I + b K + c K^2. Since P and K
    commute, it is enough to keep K, which becomes P K P, and the product of the P, which are all n x n. To be called within
    `exact_products`.
    """
    norm: Tensor = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    k = gram / norm
    k.diagonal(dim1=-2, dim2=-1).add_(NOISE)
    product: Tensor | None = None
    for index, (a, b, c) in enumerate(COEFFICIENTS):
        p = torch.baddbmm(k, k, k, beta=b, alpha=c) if k.ndim == 3 else b * k + c * (k @ k)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else product @ p
        if index < len(COEFFICIENTS) - 1:
            k = p @ k @ p
    assert product is not None
    return torch.mul(product, norm.rsqrt())
