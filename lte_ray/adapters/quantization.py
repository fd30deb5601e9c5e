"""How a head holds a frozen main weight in fewer bits, and computes with it.

A weight is quantised when it is loaded and dequantised when it is used; nothing here trains it. bf16 and int8 are plain
torch arithmetic and run wherever torch does. nf4 (QLoRA, arXiv 2305.14314) is bitsandbytes', imported when first used.

    fp32   32 bits a weight
    bf16   16
    int8    8 + 16 / columns     a step a row: round(absmax / 127) to bf16, so that code * step is exact in fp32
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
BUFFER_NAMES = ("codes", "scales", "nested_scales", "offset")  # the buffers of a `Quantized`; each format has the first few
BLOCK, NESTED_BLOCK = 64, 256


def check_format(name: str, device: torch.device) -> None:
    """Quantises and uses a tiny weight, so that what is missing is found before a run starts.

    Raises:
        ConfigError: there is no such format, its package is missing, or it doesn't work on `device`.
    """
    if name not in FORMATS:
        raise ConfigError(f"base_dtype={name!r}: there is no such format. Choose one of {', '.join(FORMATS)}.")
    try:
        weight = torch.linspace(-1, 1, 3 * BLOCK, device=device).view(6, -1)
        held, x = QuantizedWeight.from_weight(weight, name), torch.ones(1, weight.shape[1], device=device, requires_grad=True)
        torch.autograd.grad(linear(x, held, None).sum(), x)
        error = held.load(weight)
    except ConfigError:
        raise
    except Exception as e:  # whatever torch or the package says of this device
        raise ConfigError(f"base_dtype={name!r} doesn't work on {device}: {e}\nChoose another base_dtype.") from e
    if not error < 0.2:  # 0.09 for nf4; the package has been wrong for shapes that it doesn't test
        raise ConfigError(
            f"base_dtype={name!r} gives wrong values on {device}: relative error {error:.2g} instead of below 0.2. "
            "Choose another base_dtype, or another version of bitsandbytes."
        )


class QuantizedWeight(nn.Module):
    """One frozen weight in one format, made by `Quantized.of`.

    Its buffers move with the model; a change of dtype (`model.half()`, `.to(torch.float64)`) leaves them as they are.
    """

    def __init__(self, format: str, shape: torch.Size, parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        for name, part in zip(BUFFER_NAMES, parts, strict=False):
            self.register_buffer(name, part)
        self._prepare()

    def _prepare(self) -> None:
        """Makes what is shared on this device: first made under a `torch.func` transform, it would outlive that wrongly."""
        if self.format == "nf4":
            _nested_code(self.device)

    @classmethod
    def from_weight(cls, weight: Tensor, format: str) -> Self:
        """Quantises `weight`, of any shape but an empty one; int8 has a step for each index of the first dimension."""
        if format not in FORMATS or not weight.numel():
            raise ValueError(f"can't hold a weight of shape {tuple(weight.shape)} as {format!r}")
        return cls(format, weight.shape, quantize(weight, format))

    @torch.no_grad()
    def load(self, weight: Tensor) -> float:
        """Holds `weight` (same shape, any float dtype and device) from now on, in the same memory.

        Returns:
            The relative error ||W - Q(W)|| / ||W||, 0 for W = 0; nan or inf where W has such entries.
        """
        assert weight.shape == self.shape
        weight = weight.to(self.device, torch.float32)
        for part, new in zip(self.parts, quantize(weight, self.format), strict=True):
            part.copy_(new)
        norm = _norm(weight)
        return _norm(weight - self.dequantize()) / norm if norm else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q(W) in its shape, rounded once from its fp32 values. May be this module's own memory: don't write to it."""
        return dequantize(self.format, self.shape, self.parts, dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())  # type: ignore[arg-type]  # none of them is None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(part: Tensor) -> Tensor:
            new = fn(part)
            return new if new.dtype == part.dtype else part.to(new.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.format}"


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """y = x Q(W)^T + b; x is (..., in), the weight (out, in), the result (..., out).

    Computes in the dtype of x, or autocast's. The dequantised weight lives for one product: the backward pass makes it
    again. Works under `torch.func` transforms with x and b batched.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which F.linear leaves alone too
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor = _Linear.apply(x, weight.format, weight.shape, *weight.parts)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    """x Q(W)^T, which saves the codes for the backward pass, not Q(W)."""

    @staticmethod
    def forward(x: Tensor, format: str, shape: torch.Size, *parts: Tensor) -> Tensor:
        return F.linear(x, dequantize(format, shape, parts, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.format, ctx.shape, *parts = inputs
        ctx.save_for_backward(*parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy @ dequantize(ctx.format, ctx.shape, ctx.saved_tensors, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, *[None] * len(ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("vmap over quantised weights: batch x, and the factors beside them, instead")
        return _Linear.apply(x.movedim(in_dims[0], 0), *rest), 0  # type: ignore[no-untyped-call]


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> tuple[Tensor, ...]:
    """The tensors that stand for `weight`: codes, then what scales them."""
    weight = weight.detach().float().contiguous()
    if format in PLAIN_DTYPES:
        return (weight.to(PLAIN_DTYPES[format], copy=True),)
    if format == "int8":
        rows = weight.view(weight.shape[0] if weight.ndim > 1 else 1, -1)
        # 127 times a bf16 number is exact in fp32: what was dequantised gets the same codes and the same steps again
        steps = (rows.abs().amax(1, keepdim=True) / 127).bfloat16()
        steps[steps == 0] = 1
        return (rows / steps).round_().clamp_(-127, 127).to(torch.int8), steps
    padded = F.pad(weight.view(-1), (0, -weight.numel() % BLOCK))
    codes, state = _bitsandbytes().quantize_4bit(padded, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return codes.view(-1), state.absmax, state.state2.absmax, state.offset


def dequantize(format: str, shape: torch.Size, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """What `quantize` gave, as a tensor again."""
    codes, *scales = parts
    if format in PLAIN_DTYPES:
        return codes.to(dtype)
    if format == "int8":
        return codes.to(dtype).mul_(scales[0]).view(shape)
    block_scales, nested_scales, offset = scales
    code = _nested_code(codes.device)  # first, for it loads the operators
    nested = torch.ops.bitsandbytes.dequantize_blockwise(block_scales, nested_scales, code, NESTED_BLOCK, torch.float32)
    exact = dtype if dtype.itemsize == 2 else torch.float32  # no float64 kernel
    # as rows of one block each: where rows end inside a block, the CPU kernel gives wrong values (seen in 0.50.2)
    rows = (block_scales.numel(), BLOCK)
    blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, nested + offset, BLOCK, "nf4", rows, exact)
    return blocks.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _norm(weight: Tensor) -> float:
    """The Frobenius norm in float64, as the square of one large entry would be inf; in slices, for time and memory."""
    pieces = weight.reshape(-1).split(1 << 20)  # type: ignore[no-untyped-call]
    norms = [torch.linalg.vector_norm(piece.double()) for piece in pieces]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


_NESTED_CODES: dict[torch.device, Tensor] = {}  # not functools.cache, of which torch.compile warns


def _nested_code(device: torch.device) -> Tensor:
    """The 256 values of the block scales' 8-bit codes, shared by all weights on `device`."""
    if device not in _NESTED_CODES:
        _NESTED_CODES[device] = _bitsandbytes().create_dynamic_map().to(device)
    return _NESTED_CODES[device]


def _bitsandbytes() -> Any:
    """`bitsandbytes.functional`; 2 s the first time.

    Raises:
        ConfigError: it isn't installed.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # warns, on some CPUs, that an extra it could use is missing
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"base_dtype='nf4' needs the package bitsandbytes, but {e.name!r} isn't installed: pip install 'lte-ray[quant]', "
            "on every node. Or choose base_dtype='int8', which needs nothing more."
        ) from e
    finally:
        log.setLevel(level)
