"""Sums of low-rank products as one product, of the smallest rank that holds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Term = tuple[float, Tensor, Tensor]
"""c, B (out x r), A (r x in), for c B A."""


def joined(terms: list[Term]) -> tuple[Tensor, Tensor]:
    """(B, A) with B A = sum_k c_k B_k A_k, of rank sum_k r_k."""
    return torch.cat([c * b for c, b, _ in terms], dim=1), torch.cat([a for _, _, a in terms])


def dense_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) with B A = the matrix (out x in), of rank min(out, in): itself and the identity."""
    out, inner = matrix.shape
    if inner <= out:
        return matrix, torch.eye(inner, dtype=matrix.dtype, device=matrix.device)
    return torch.eye(out, dtype=matrix.dtype, device=matrix.device), matrix


class Tally:
    """Picks the smallest factors of each matrix, and adds up their error."""

    def __init__(self) -> None:
        self.exact, self._off, self._size = True, 0.0, 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self._off / self._size) if self._size else 0.0

    def add(self, delta: Tensor, b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """B and A if their rank is within min(out, in) and `rank`; else the best of `rank`, by SVD, or the change itself."""
        full = min(delta.shape)
        most = full if rank is None else min(rank, full)
        if a.shape[0] > full and most == full:
            b, a = dense_factors(delta.to(b.dtype))
        elif a.shape[0] > most:
            u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
            root = sigma[:most].sqrt()
            b, a = (u[:, :most] * root).to(b.dtype), (root[:, None] * v[:most]).to(a.dtype)
            self.exact = False
        self._off += float(torch.linalg.vector_norm(delta - b.double() @ a.double())) ** 2
        self._size += float(torch.linalg.vector_norm(delta)) ** 2
        return b, a
