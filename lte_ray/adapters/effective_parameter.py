"""Weights that a model uses without calling the layer that holds them: `F.linear(x, self.tokens.weight)`.

What the layer holds under that name is the main weight, which gets no gradient and lacks what the factors add. While a
loss is computed, readers get a stand-in for it: it may be looked at, and what computes with it gets the weight in use.
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
"""Whether a head computes its loss: elsewhere, parameters are what they are."""

_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "data", "grad", "grad_fn", "is_leaf"),
    *("requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "detach", "get_device", "is_contiguous"),
    *("is_floating_point", "is_complex", "__len__", "__repr__"),
)
_LOOKS = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class EffectiveParameter(Tensor):
    """A parameter that may be looked at: shape, type, device. What computes with it gets what trains in its place."""

    _lte_effective: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x._lte_effective() if isinstance(x, EffectiveParameter) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def effective_parameter(held: Tensor, in_use: Callable[[], Tensor]) -> Tensor:
    """`held` to look at; whatever computes with it computes with `in_use()`."""
    made: EffectiveParameter = held.detach().as_subclass(EffectiveParameter)
    made._lte_effective = in_use
    return made


@contextmanager
def computing_loss(really: bool = True) -> Iterator[None]:
    """Within the block a head computes its loss (or doesn't)."""
    token = COMPUTING_LOSS.set(really)
    try:
        yield
    finally:
        COMPUTING_LOSS.reset(token)
