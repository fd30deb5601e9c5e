"""Sinusoidal position embeddings for sequences and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lte_ray.errors import ConfigError


def sinusoidal(d_model: int, max_len: int = 5000) -> Tensor:
    """pe[pos, 2i] = sin(pos 10000^(-2i / d)), pe[pos, 2i + 1] = cos(pos 10000^(-2i / d)), shaped (1, max_len, d_model).

    An odd d_model has one more sine than cosines. Computed in float64 and returned in the default type.

    Raises:
        ConfigError: a size is below 1.
    """
    _check(d_model=d_model, max_len=max_len)
    return _waves(max_len, d_model, 10000.0).to(torch.get_default_dtype()).unsqueeze(0)


def sinusoidal_2d(d_model: int, height: int, width: int, normalization_constant: float | None = None) -> Tensor:
    """pe(y, x) = enc(y) + enc(x), in row-major order, shaped (1, height * width, d_model).

    enc is the table of `sinusoidal` with the normalization constant, by default height * width, instead of 10000.

    Raises:
        ConfigError: a size is below 1, or the constant isn't positive.
    """
    _check(d_model=d_model, height=height, width=width)
    base = height * width if normalization_constant is None else normalization_constant
    if base <= 0:
        raise ConfigError(f"normalization_constant = {normalization_constant} must be above 0.")
    rows, columns = _waves(height, d_model, base), _waves(width, d_model, base)
    return (rows[:, None] + columns[None]).flatten(0, 1).to(torch.get_default_dtype()).unsqueeze(0)


class PositionalEncoding(nn.Module):
    """Adds position embeddings: x + pe, where the buffer `pe` (1, max_len, d_model) is the `sinusoidal` table.

    Args:
        d_model: width of the embeddings.
        max_len: length of the longest sequence.
        batch_first: inputs are (..., sequence, d_model); else (sequence, batch, d_model) or (sequence, d_model).

    Raises:
        ConfigError: a size is below 1.
    """

    pe: Tensor

    def __init__(self, d_model: int, max_len: int = 5000, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.register_buffer("pe", sinusoidal(d_model, max_len))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the embeddings of its positions, with the shape and type of x.

        Raises:
            ConfigError: the sequence is longer than max_len, or x isn't d_model wide.
        """
        _, max_len, d_model = self.pe.shape
        if x.dim() < 2 or x.shape[-1] != d_model or (x.dim() > 3 and not self.batch_first):
            order = "(..., sequence, d_model)" if self.batch_first else "(sequence, batch, d_model)"
            raise ConfigError(f"x has shape {tuple(x.shape)}; {order} with d_model = {d_model} is expected.")
        length = x.shape[-2] if self.batch_first else x.shape[0]
        if length > max_len:
            raise ConfigError(f"A sequence of {length} positions is longer than max_len = {max_len}; raise max_len.")
        table = self.pe[0, :length].to(x.dtype)
        return x + (table if self.batch_first or x.dim() == 2 else table.unsqueeze(1))

    def extra_repr(self) -> str:
        return f"d_model={self.pe.shape[2]}, max_len={self.pe.shape[1]}, batch_first={self.batch_first}"


def _waves(length: int, d_model: int, base: float) -> Tensor:
    """(length, d_model) in float64: column 2i is sin(pos base^(-2i / d)), column 2i + 1 its cosine."""
    column = torch.arange(d_model, dtype=torch.float64, device="cpu")
    even = column - column % 2
    angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * base ** (-even / d_model)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} = {size} must be at least 1.")
