"""Numeric comparison of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

EPS64 = torch.finfo(torch.float64).eps


EPS32 = torch.finfo(torch.float32).eps


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts that the Frobenius error is at most `tolerance` times the norm, or times 1 for smaller norms."""
    assert actual.shape == expected.shape
    error = float(torch.linalg.vector_norm((actual.double() - expected.double()).detach()))
    assert error <= tolerance * max(1.0, float(torch.linalg.vector_norm(expected.detach().double()))), error
