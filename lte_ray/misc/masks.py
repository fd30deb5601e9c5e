"""Combines all kinds of masks that `nn.MultiheadAttention` takes into one mask that is added to the scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_ray.errors import ConfigError


def additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores: True becomes -inf and False 0; floating-point masks are only cast.

    Raises:
        ConfigError: the mask is neither bool nor floating-point.
    """
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise ConfigError(
            f"{name} has type {mask.dtype}; pass a bool mask (True: not attended) or a floating-point one (added)."
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def merged(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    sizes: tuple[int, int, int, int],
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """attn_mask + key_padding_mask, broadcastable to the scores (N, heads, L, S + extra); None without masks.

    Args:
        attn_mask: (L, S), or (N * heads, L, S) with a mask for each sample and head.
        key_padding_mask: (N, S).
        sizes: N, heads, L, S.
        extra: number of keys appended to those of the input (learned, zero), which no mask hides.
        dtype: type of the scores.

    Raises:
        ConfigError: a mask has the wrong shape or type.
    """
    batch, heads, length, keys = sizes
    total: Tensor | None = None
    if attn_mask is not None:
        total = additive(attn_mask, "attn_mask", dtype)
        if tuple(total.shape) == (length, keys):
            total = total.view(1, 1, length, keys)
        elif tuple(total.shape) == (batch * heads, length, keys):
            total = total.reshape(batch, heads, length, keys)
        else:
            raise ConfigError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; these inputs need (queries, keys) = {(length, keys)} or "
                f"(batch * heads, queries, keys) = {(batch * heads, length, keys)}."
            )
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ConfigError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; these inputs need (batch, keys) = "
                f"{(batch, keys)} (unbatched: keys only)."
            )
        padding = additive(key_padding_mask, "key_padding_mask", dtype).view(batch, 1, 1, keys)
        total = padding if total is None else total + padding
    if total is not None and extra:
        total = F.pad(total, (0, extra))
    return total
