"""Sinusoidal position embeddings against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lte_ray.errors import ConfigError
from lte_ray.misc import PositionalEncoding, sinusoidal, sinusoidal_2d


def formula(pos: int, column: int, d: int, base: float) -> float:
    angle = pos * base ** (-2 * (column // 2) / d)
    return math.cos(angle) if column % 2 else math.sin(angle)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_one_dimension(d: int) -> None:
    """Even and odd widths. 1e-7: float64 rounded to float32 (values up to 1)."""
    expected = torch.tensor([[[formula(pos, c, d, 10000) for c in range(d)] for pos in range(40)]])
    actual = sinusoidal(d, 40)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, rtol=0, atol=1e-7)
    assert sinusoidal(d).shape == (1, 5000, d)


@pytest.mark.parametrize("d", [1, 4, 7])
@pytest.mark.parametrize("constant", [None, 100.0])
def test_two_dimensions(d: int, constant: float | None) -> None:
    """enc(y) + enc(x) in row-major order, with the base height * width or a given one."""
    height, width = 3, 5
    base = constant or height * width
    rows = [[formula(y, c, d, base) + formula(x, c, d, base) for c in range(d)] for y in range(height) for x in range(width)]
    assert_close(sinusoidal_2d(d, height, width, constant), torch.tensor([rows]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("batch_first", [True, False])
def test_each_position_gets_its_own_embedding(batch_first: bool) -> None:
    """Both orders of dimensions give the same; an unbatched sequence works too."""
    x = torch.randn(2, 4, 6)
    expected = x + sinusoidal(6, 4)
    module = PositionalEncoding(6, 9, batch_first=batch_first)
    actual: Tensor = module(x) if batch_first else module(x.transpose(0, 1)).transpose(0, 1)
    assert torch.equal(actual, expected)
    assert torch.equal(module(x[0]), expected[0])


def test_type_and_buffer() -> None:
    """The output has the input's type; the table is a buffer that doesn't train."""
    module = PositionalEncoding(6, 9)
    assert module(torch.zeros(1, 9, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [name for name, _ in module.named_buffers()] == ["pe"]
    assert list(module.parameters()) == []


def test_wrong_arguments_are_one_clear_error() -> None:
    """A sequence that is too long, a wrong width, and sizes below 1."""
    with pytest.raises(ConfigError, match="10 positions is longer than max_len = 9; raise max_len"):
        PositionalEncoding(6, 9)(torch.zeros(1, 10, 6))
    with pytest.raises(ConfigError, match="10 positions"):
        PositionalEncoding(6, 9, batch_first=False)(torch.zeros(10, 1, 6))
    with pytest.raises(ConfigError, match="d_model = 6 is expected"):
        PositionalEncoding(6, 9)(torch.zeros(1, 4, 1))
    with pytest.raises(ConfigError, match="d_model = 0 must be at least 1"):
        sinusoidal(0)
    with pytest.raises(ConfigError, match="height = 0"):
        sinusoidal_2d(4, 0, 3)
    with pytest.raises(ConfigError, match="must be above 0"):
        sinusoidal_2d(4, 2, 3, normalization_constant=0)
