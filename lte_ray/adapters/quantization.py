"""Stores a frozen main weight in fewer bits, and computes with it.

A weight is quantized when it is loaded and dequantized when it is used; it isn't trained. bf16 and int8 are plain torch
arithmetic and run wherever torch does. nf4 (QLoRA, arXiv 2305.14314) comes from bitsandbytes, imported on first use.

    fp32   32 bits per weight
    bf16   16
    int8    8 + 16 / columns     one step per row: absmax / 127 rounded to bf16, so that code * step is exact in fp32
    nf4     4.127                blocks of 64 weights; their absmax in 8 bits, in blocks of 256 around their mean
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import BASE_DTYPES
from lte_ray.errors import ConfigError

FORMATS = BASE_DTYPES
PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUFFER_NAMES = ("codes", "scales", "nested_scales", "offset")  # of a `QuantizedWeight`; each format has the first few
BLOCK, NESTED_BLOCK = 64, 256


def check_format(name: str, device: torch.device) -> None:
    """Quantizes and uses a tiny weight, to detect before a run starts what would fail.

    Raises:
        ConfigError: the format doesn't exist, its package is missing, or it doesn't work on `device`.
    """
    if name not in FORMATS:
        raise ConfigError(f"base_dtype={name!r}: this format doesn't exist. Choose one of {', '.join(FORMATS)}.")
    try:
        weight = torch.linspace(-1, 1, 3 * BLOCK, device=device).view(6, -1)
        quantized, x = (
            QuantizedWeight.from_weight(weight, name),
            torch.ones(1, weight.shape[1], device=device, requires_grad=True),
        )
        torch.autograd.grad(linear(x, quantized, None).sum(), x)
        error = quantized.load(weight)
    except ConfigError:
        raise
    except Exception as e:  # whatever torch or the package raises for this device
        raise ConfigError(f"base_dtype={name!r} doesn't work on {device}: {e}\nChoose another base_dtype.") from e
    if not error < 0.2:  # 0.09 for nf4; the package has returned wrong values for shapes that it doesn't test
        raise ConfigError(
            f"base_dtype={name!r} gives wrong values on {device}: relative error {error:.2g} instead of below 0.2. "
            "Choose another base_dtype, or another version of bitsandbytes."
        )


class QuantizedWeight(nn.Module):
    """One frozen weight in one format; create it with `from_weight`.

    Its buffers move with the model; they ignore a change of dtype (`model.half()`, `.to(torch.float64)`).
    """

    def __init__(self, format: str, shape: torch.Size, parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        for name, part in zip(BUFFER_NAMES, parts, strict=False):
            self.register_buffer(name, part)
        self._prepare()

    def _prepare(self) -> None:
        """Creates what weights share on this device, outside of `torch.func` transforms, which tensors must not outlive."""
        if self.format == "nf4":
            _nested_code(self.device)

    @classmethod
    def from_weight(cls, weight: Tensor, format: str) -> Self:
        """Quantizes a non-empty weight of any shape; int8 has one step per index of the first dimension."""
        if format not in FORMATS or not weight.numel():
            raise ValueError(f"can't store a weight of shape {tuple(weight.shape)} as {format!r}")
        return cls(format, weight.shape, quantize(weight, format))

    @torch.no_grad()
    def load(self, weight: Tensor) -> float:
        """Replaces the stored weight by `weight` (same shape, any float dtype and device), in the same memory.

        Returns:
            The relative error ||W - Q(W)|| / ||W||, 0 for W = 0; nan or inf if W has such entries.
        """
        assert weight.shape == self.shape
        weight = weight.to(self.device, torch.float32)
        for part, new in zip(self.parts, quantize(weight, self.format), strict=True):
            part.copy_(new)
        norm = _norm(weight)
        return _norm(weight - self.dequantize()) / norm if norm else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns Q(W) in its shape, rounded once from fp32. It may share this module's memory: don't write to it."""
        return dequantize(self.format, self.shape, self.parts, dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())  # type: ignore[arg-type]  # none of them is None

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(part: Tensor) -> Tensor:
            new = fn(part)
            return new if new.dtype == part.dtype else part.to(new.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.format}"


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Returns x Q(W)^T + b; x is (..., in), the weight (out, in), the result (..., out).

    Computes in the dtype of x, or that of autocast. The dequantized weight exists only during one product: the backward pass
    dequantizes it again. Works in `torch.func` transforms that batch x and b.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # as F.linear does
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor = _Linear.apply(x, weight.format, weight.shape, *weight.parts)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    """x Q(W)^T; saves the codes for the backward pass, not Q(W)."""

    @staticmethod
    def forward(x: Tensor, format: str, shape: torch.Size, *parts: Tensor) -> Tensor:
        return F.linear(x, dequantize(format, shape, parts, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.format, ctx.shape, *parts = inputs
        ctx.save_for_backward(*parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors  # read once: recomputed activations are given out only once
        dx = dy @ dequantize(ctx.format, ctx.shape, parts, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, *[None] * len(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("vmap over quantized weights: batch x and the factors instead")
        return _Linear.apply(x.movedim(in_dims[0], 0), *rest), 0  # type: ignore[no-untyped-call]


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> tuple[Tensor, ...]:
    """Returns the tensors that represent `weight`: codes, then their scales."""
    weight = weight.detach().float().contiguous()
    if format in PLAIN_DTYPES:
        return (weight.to(PLAIN_DTYPES[format], copy=True),)
    if format == "int8":
        rows = weight.view(weight.shape[0] if weight.ndim > 1 else 1, -1)
        # 127 times a bf16 number is exact in fp32, so a dequantized weight is quantized to the same codes and steps again
        steps = (rows.abs().amax(1, keepdim=True) / 127).bfloat16()
        steps[steps == 0] = 1
        return (rows / steps).round_().clamp_(-127, 127).to(torch.int8), steps
    padded = F.pad(weight.view(-1), (0, -weight.numel() % BLOCK))
    codes, state = _bitsandbytes().quantize_4bit(padded, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return codes.view(-1), state.absmax, state.state2.absmax, state.offset


def dequantize(format: str, shape: torch.Size, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Reconstructs the weight from what `quantize` returned."""
    codes, *scales = parts
    if format in PLAIN_DTYPES:
        return codes.to(dtype)
    if format == "int8":
        return codes.to(dtype).mul_(scales[0]).view(shape)
    block_scales, nested_scales, offset = scales
    code = _nested_code(codes.device)  # first, since it loads the operators
    nested = torch.ops.bitsandbytes.dequantize_blockwise(block_scales, nested_scales, code, NESTED_BLOCK, torch.float32)
    exact = dtype if dtype.itemsize == 2 else torch.float32  # no float64 kernel
    # one block per row: if rows end inside a block, the CPU kernel returns wrong values (seen in bitsandbytes 0.50.2)
    rows = (block_scales.numel(), BLOCK)
    blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, nested + offset, BLOCK, "nf4", rows, exact)
    return blocks.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _norm(weight: Tensor) -> float:
    """Returns the Frobenius norm, in float64 since squares may overflow; in slices, to save time and memory."""
    pieces = weight.reshape(-1).split(1 << 20)  # type: ignore[no-untyped-call]
    norms = [torch.linalg.vector_norm(piece.double()) for piece in pieces]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


_NESTED_CODES: dict[torch.device, Tensor] = {}  # not functools.cache, about which torch.compile warns


def _nested_code(device: torch.device) -> Tensor:
    """Returns the 256 values of the block scales' 8-bit codes, shared by all weights on `device`."""
    if device not in _NESTED_CODES:
        _NESTED_CODES[device] = _bitsandbytes().create_dynamic_map().to(device)
    return _NESTED_CODES[device]


def _bitsandbytes() -> Any:
    """Imports `bitsandbytes.functional`; takes 2 s the first time.

    Raises:
        ConfigError: it isn't installed.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # on some CPUs, warns that an optional package is missing
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"base_dtype='nf4' needs the package bitsandbytes, but {e.name!r} isn't installed: pip install 'lte-ray[quant]', "
            "on every node. Or choose base_dtype='int8', which needs no other package."
        ) from e
    finally:
        log.setLevel(level)
