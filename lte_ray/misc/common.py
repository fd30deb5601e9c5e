"""Chooses the number type and kernels that suit a device, for training with float32 parameters and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lte_ray.misc import distributed


def determine_compute_context(
    device: torch.device | str | None = None,
) -> tuple[torch.dtype, AbstractContextManager[object], torch.amp.GradScaler]:
    """Returns the type for parameters, a context that computes in `auto_dtype`, and a gradient scaler.

    The context can be entered repeatedly, but not nested::

        dtype, context, scaler = determine_compute_context()
        model.to(dtype)
        with context:
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    Args:
        device: the model's device; by default that of this process (`distributed.device`).

    Returns:
        The type is always float32, because merges add small changes. The context is autocast; it has no effect on devices
        without autocast. The scaler scales if the context computes in float16 (CUDA devices without bfloat16), else it
        passes everything through.
    """
    device = _resolve(device)
    dtype = auto_dtype(device)
    context = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    scales = dtype == torch.float16
    return torch.float32, context, torch.amp.GradScaler("cuda" if scales else "cpu", enabled=scales)


def auto_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16; float16 on CUDA devices without it (older than Ampere); float32 on devices without autocast."""
    device = _resolve(device)
    if not torch.amp.is_autocast_available(device.type):
        return torch.float32
    # Not is_bf16_supported(): it is also true if bfloat16 is emulated, which is slower than float32.
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def autocast_vars(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Casts floating-point tensors to autocast's type if it is on for their device; one argument gives one tensor."""
    cast = tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        else x
        for x in tensors
    )
    return cast[0] if len(cast) == 1 else cast


def flash_ready_device(device: torch.device | str | None = None) -> bool:
    """Whether PyTorch's flash attention runs on the device: an NVIDIA GPU, Ampere or later, and a PyTorch built with it."""
    device = _resolve(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _resolve(device: torch.device | str | None) -> torch.device:
    return distributed.device() if device is None else torch.device(device)
