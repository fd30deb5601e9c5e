"""Effective weights for models that use a weight without calling its layer, as in `F.linear(x, self.tokens.weight)`.

The layer's parameter with that name is the main weight, which gets no gradient and lacks the factors' product. While a loss
is computed, readers get an `EffectiveParameter` instead: it has the parameter's metadata, and operations use the effective
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

COMPUTING_LOSS: ContextVar[bool] = ContextVar("lte_ray_computing", default=False)
"""Whether a head is computing its loss: otherwise, readers get the parameters themselves."""

_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "data", "grad", "grad_fn", "is_leaf"),
    *("requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "detach", "get_device", "is_contiguous"),
    *("is_floating_point", "is_complex", "__len__", "__repr__"),
)
_METADATA_ACCESS = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class EffectiveParameter(Tensor):
    """Has the metadata of a parameter (shape, type, device); operations on it use the effective parameter."""

    _lte_effective: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA_ACCESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x._lte_effective() if isinstance(x, EffectiveParameter) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def effective_parameter(stored: Tensor, effective: Callable[[], Tensor]) -> Tensor:
    """Returns a tensor with the metadata of `stored`, for which operations use `effective()` instead."""
    parameter: EffectiveParameter = stored.detach().as_subclass(EffectiveParameter)
    parameter._lte_effective = effective
    return parameter


@contextmanager
def computing_loss(active: bool = True) -> Iterator[None]:
    """Marks the block as computing a head's loss, or not."""
    token = COMPUTING_LOSS.set(active)
    try:
        yield
    finally:
        COMPUTING_LOSS.reset(token)
