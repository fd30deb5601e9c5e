"""Weights that a model uses without calling the layer that holds them: the right ones, or an error, never stale ones.

`F.linear(x, self.tokens.weight)` or `self.positions.weight[:t]` ask a layer for its parameter. What it holds under that name
is the merged one, which gets no gradient: evaluation wants it, training doesn't.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.modes.batch_split import BATCH

CALLED: ContextVar[bool] = ContextVar("lte_ray_called", default=False)
"""Whether a prepared model's forward is running: elsewhere, parameters are what they are."""


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


class Called(nn.Module):
    """A model whose forward notes in `CALLED` that it runs, however it ends: torch's hooks don't see a KeyboardInterrupt.

    A model becomes one by `note_calls`, which changes its class and keeps its name.
    """

    _lte_uncalled: ClassVar[type[nn.Module]]

    def __reduce__(self) -> str | tuple[Any, ...]:
        plain = type(self)._lte_uncalled
        if plain.__reduce__ is not object.__reduce__:
            return super().__reduce__()
        return _blank, (plain,), self.__getstate__()  # type: ignore[no-untyped-call]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def called(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose forward notes that it runs; it goes by the same name."""
    if plain in _CLASSES:
        return _CLASSES[plain]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = CALLED.get()
        CALLED.set(True)
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            CALLED.set(before)
            BATCH.set(None)

    names = {"_lte_uncalled": plain, "forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    _CLASSES[plain] = type(plain.__name__, (Called, plain), names)
    return _CLASSES[plain]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = called(plain)
    return made.__new__(made)


def note_calls(model: nn.Module) -> None:
    """Makes `model` one whose forward notes that it runs."""
    model.__class__ = called(type(model))
