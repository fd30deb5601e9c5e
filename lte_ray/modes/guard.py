"""Weights that a model uses without calling the layer that holds them: the right ones, or an error, never stale ones.

`F.linear(x, self.tokens.weight)` or `self.positions.weight[:t]` ask a layer for its parameter. What it holds under that name
is the merged one, which gets no gradient: evaluation wants it, training doesn't.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lte_ray.errors import ConfigError

CALLED: ContextVar[bool] = ContextVar("lte_ray_called", default=False)
"""Whether a prepared model's forward is running: elsewhere, parameters are what they are."""

_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "data", "grad", "grad_fn", "is_leaf"),
    *("requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "detach", "get_device", "is_contiguous"),
    *("is_floating_point", "is_complex", "__len__", "__repr__"),
)
_LOOKS = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class StandIn(Tensor):
    """A merged parameter that may be looked at: shape, type, device. What computes with it gets what trains in its place."""

    _lte_in_use: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x._lte_in_use() if isinstance(x, StandIn) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def stand_in(merged: Tensor, in_use: Callable[[], Tensor]) -> Tensor:
    """`merged` to look at; whatever computes with it computes with `in_use()`."""
    made: StandIn = merged.detach().as_subclass(StandIn)
    made._lte_in_use = in_use
    return made


def refuse(what: str) -> Tensor:
    """Raises ConfigError: outside of any head, `what` has one value for each head."""
    raise ConfigError(
        f"{what} is used by another module without calling the layer that holds it: each head trains its own, and only layers "
        "that are called know for which head they compute. Use chunk='model' in prepare_model_for_lte, which runs the whole "
        "model once for each head, or call the layer."
    )


def check_not_merged(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of merged modules, which are for evaluation: raises ConfigError in training."""
    name = module.__dict__.get("lte_merged")
    if name is not None and module.training and CALLED.get():
        refuse(f"{name}, inside of a replica layer,")


def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of prepared models."""
    CALLED.set(True)


def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of prepared models."""
    CALLED.set(False)
