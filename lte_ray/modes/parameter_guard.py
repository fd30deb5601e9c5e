"""Guards parameters that a model uses without calling their layer: the model gets the right tensor or an error.

`F.linear(x, self.tokens.weight)` or `self.positions.weight[:t]` reads a layer's parameter. The layer stores the merged
parameter under that name, which gets no gradient: right in evaluation, wrong in training.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.modes.batch_split import MODEL_BATCH

MODEL_RUNNING: ContextVar[bool] = ContextVar("lte_ray_called", default=False)
"""Whether a prepared model's forward is running. Outside of it, reading a parameter gives the stored one."""


def refuse_use(what: str) -> Tensor:
    """Raises ConfigError: while no head is active, `what` has one value for each head."""
    raise ConfigError(
        f"{what} is used by another module without calling the layer that holds it: each head trains its own copy, and only "
        "layers that are called know which head they compute for. Use chunk='model' in prepare_model_for_lte, which runs the "
        "whole model once for each head, or call the layer."
    )


def check_not_merged(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of merged modules, which are for evaluation only: raises ConfigError in training."""
    name = module.__dict__.get("lte_merged")
    if name is not None and module.training and MODEL_RUNNING.get():
        refuse_use(f"{name}, inside a replica layer,")


class TrackedModel(nn.Module):
    """A model whose forward sets `MODEL_RUNNING` and resets it however it ends: torch's hooks miss a KeyboardInterrupt.

    `track_calls` turns a model into one by changing its class; the class keeps its name.
    """

    lte_untracked_class: ClassVar[type[nn.Module]]

    def __reduce__(self) -> str | tuple[Any, ...]:
        untracked = type(self).lte_untracked_class
        if untracked.__reduce__ is not object.__reduce__:
            return super().__reduce__()
        return _make_blank, (untracked,), self.__getstate__()  # type: ignore[no-untyped-call]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def track_calls(model: nn.Module) -> None:
    """Turns `model`, in place, into a `TrackedModel`."""
    model.__class__ = tracked_class(type(model))


def tracked_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The `TrackedModel` subclass of a class; it has the same name."""
    if plain in _CLASSES:
        return _CLASSES[plain]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = MODEL_RUNNING.get()
        MODEL_RUNNING.set(True)
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            MODEL_RUNNING.set(before)
            MODEL_BATCH.set(None)

    names = {"lte_untracked_class": plain, "forward": forward}
    names |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    _CLASSES[plain] = type(plain.__name__, (TrackedModel, plain), names)
    return _CLASSES[plain]


def _make_blank(plain: type[nn.Module]) -> nn.Module:
    """A tracked model without any state, for pickle: the classes can't be found by name."""
    tracked = tracked_class(plain)
    return tracked.__new__(tracked)
