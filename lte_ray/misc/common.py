"""Which number type and kernels suit a device, for training with float32 parameters and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lte_ray.misc import distributed


def determine_compute_context(
    device: torch.device | str | None = None,
) -> tuple[torch.dtype, AbstractContextManager[object], torch.amp.GradScaler]:
    """The type of parameters, a context that computes in `auto_dtype`, and a gradient scaler.

    The context may be entered again and again, one at a time::

        dtype, context, scaler = determine_compute_context()
        model.to(dtype)
        with context:
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    Args:
        device: where the model is; unless given, that of this process (`distributed.device`).

    Returns:
        float32, always: merges add small changes. The context is autocast; without effect on devices that have none. The
        scaler scales where the context computes in float16, on CUDA devices without bfloat16, and else does nothing.
    """
    device = _resolved(device)
    dtype = auto_dtype(device)
    context = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    scales = dtype == torch.float16
    return torch.float32, context, torch.amp.GradScaler("cuda" if scales else "cpu", enabled=scales)


def auto_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16, or float16 on CUDA devices that lack it (older than Ampere), or float32 where there is no autocast."""
    device = _resolved(device)
    if not torch.amp.is_autocast_available(device.type):
        return torch.float32
    # Not is_bf16_supported(): it says yes where bfloat16 is only emulated, and slower than float32.
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def autocast_vars(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Floating-point tensors in autocast's type where autocast is on, and as they are elsewhere; for one tensor, that one."""
    cast = tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        else x
        for x in tensors
    )
    return cast[0] if len(cast) == 1 else cast


def flash_ready_device(device: torch.device | str | None = None) -> bool:
    """Whether PyTorch's flash attention runs there: NVIDIA GPUs from Ampere on, with a PyTorch built with it."""
    device = _resolved(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _resolved(device: torch.device | str | None) -> torch.device:
    return distributed.device() if device is None else torch.device(device)
