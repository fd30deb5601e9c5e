"""Which number type and kernels suit a device, for training with float32 parameters and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from lte_ray.misc import distributed


def determine_compute_context(
    device: torch.device | str | None = None,
) -> tuple[torch.dtype, AbstractContextManager[object], torch.amp.GradScaler | None]:
    """The type to compute in, a context that computes in it, and the gradient scaler that it needs, if any.

    Parameters stay in float32. The context may be entered again and again, one at a time::

        dtype, context, scaler = determine_compute_context()
        with context:
            loss = model(x)
        loss.backward()  # with a scaler: scaler.scale(loss).backward(), scaler.step(optimizer), scaler.update()

    Args:
        device: where the model is; unless given, that of this process (`distributed.device`).

    Returns:
        bfloat16, its autocast and None; on CUDA devices without bfloat16 float16, its autocast and a scaler; float32,
        a context without effect and None for devices without autocast.
    """
    device = _resolved(device)
    dtype = auto_dtype(device)
    if dtype == torch.float32:
        return dtype, nullcontext(), None
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
    return dtype, torch.autocast(device.type, dtype=dtype), scaler


def auto_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16, or float16 on CUDA devices that lack it (older than Ampere), or float32 where there is no autocast."""
    device = _resolved(device)
    if not torch.amp.is_autocast_available(device.type):
        return torch.float32
    # Not is_bf16_supported(): it says yes where bfloat16 is only emulated, and slower than float32.
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def flash_ready_device(device: torch.device | str | None = None) -> bool:
    """Whether PyTorch's flash attention runs there: NVIDIA GPUs from Ampere on, with a PyTorch built with it."""
    device = _resolved(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _resolved(device: torch.device | str | None) -> torch.device:
    return distributed.device() if device is None else torch.device(device)
