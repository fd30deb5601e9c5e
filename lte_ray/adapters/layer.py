"""One head's layers: the user's own layers, in place, with factors added to the main weight."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lte_ray.adapters.factors import Factors
from lte_ray.adapters.layer_kinds import TORCH_KINDS, TRANSPOSED_LINEAR, LayerKind, kind_of
from lte_ray.adapters.product_cost import forms_weight
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.adapters.quantization import linear as quantized_linear
from lte_ray.adapters.user_parameter import UserParameter, UserParameters


class LTELayer(nn.Module):
    """Base class of all layers with factors, in every mode: `isinstance(layer, LTELayer)` finds them."""


class HeadLayer(LTELayer):
    """y = f(x; W~, b) + s (B A)(x): a layer of one head (LTE, arXiv 2402.16828, eq. 5-6).

    The same is computed as f(x; W~ + s B A, b) where that is cheaper (`product_cost`).

    W~ = W_v - s B' A' is the head's own copy of the main weight: base version v minus what v already contains of this head (the
    reference A', B'). If the main weight is shared or quantized, W~ = W_v, and the reference's product is computed separately
    (`Factors`). The layer's weight and bias remain parameters of the same names, in which other code finds the effective
    values (`adapters.user_parameter`).

    `add_factors` turns a layer into a `HeadLayer` by changing its class, so that its attributes, hooks and all references to it
    remain.
    """

    kind: ClassVar[LayerKind]
    plain: ClassVar[type[nn.Module]]
    lte_parameters: dict[str, UserParameter]
    lte_head: UserParameters

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(layer)(...)`` makes a layer of the user's class; without arguments, pickle makes one of this class."""
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, x: Tensor) -> Tensor:
        head = self.lte_head
        if not head.watching_views:
            return self._compute(x)
        with head.inside_layer():
            return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        kind, own = self.kind, self.__dict__["_parameters"]
        weight, bias = own["weight"], own.get("bias")
        user_weight = self.lte_parameters["weight"]
        if weight is not user_weight.parameter:  # a caller substitutes it, as torch.func.functional_call does
            return kind.main(self, x, weight, bias)
        user_bias, dtype = self.lte_parameters.get("bias"), user_weight.dtype
        in_place = self.lte_head.active and self.lte_head.functional is None
        if user_bias is not None and bias is user_bias.parameter and not (in_place and user_bias.tracked):
            assert isinstance(user_bias.stored, Tensor)
            change = user_bias.factors.vector_change()
            bias = (user_bias.stored + (change if bias.requires_grad else change.detach())).to(user_bias.dtype)
        if in_place and user_weight.tracked:
            return kind.main(self, x, weight, bias)
        if kind.product is None:
            assert isinstance(user_weight.stored, Tensor)
            change = user_weight.factors.vector_change()
            change = change if weight.requires_grad else change.detach()
            return kind.main(self, x, (user_weight.stored + change).to(dtype), bias)
        a, b = user_weight.factors.effective_pair()
        if not weight.requires_grad:  # the loss has frozen the layer, perhaps for one of several parts
            a, b = a.detach(), b.detach()
        stored = user_weight.stored
        if isinstance(stored, Tensor):
            apart = kind.name == "embedding" or not weight.requires_grad or self.lte_head.functional is not None
            if not apart and forms_weight(self, user_weight.spec, x, stored, a.shape[0]):
                return kind.main(self, x, user_weight.effective(), bias)
            y = kind.main(self, x, stored, bias)
        elif kind.name == "linear":
            y = quantized_linear(x, stored, bias)
        else:
            y = kind.main(self, x, stored.dequantize(dtype if kind.name == "embedding" else x.dtype), bias)
        return y + kind.product(self, x, a.to(dtype), b.to(dtype), user_weight.factors.scaling)

    @property
    def lte_factors(self) -> Factors:
        """The factors of the layer's weight."""
        return self.lte_parameters["weight"].factors

    def plain_forward(self, x: Tensor) -> Tensor:
        """Computes what the layer computed before it had factors, with the parameters that `_norm` substitutes."""
        y: Tensor = self.plain.forward(self, x)
        return y

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # type: ignore[override]
        """The layer's parameters, as `named_parameters`, `state_dict` and others of torch's methods read them."""
        parameters: dict[str, nn.Parameter | None] = self.__dict__["_parameters"]
        if self.lte_head.active:
            for name, each in self.lte_parameters.items():
                if parameters[name] is each.parameter:
                    self.lte_head.read_by_name(each)
        return parameters

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in ("weight", "bias"):
            user = self.__dict__["lte_parameters"].get(name)
            if user is not None and value is user.parameter:
                return self.__dict__["lte_head"].read(user)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A layer of the user's own class with the effective weight, such as a teacher that follows the model."""
        for user in self.lte_parameters.values():
            if id(user.parameter) not in memo:
                memo[id(user.parameter)] = nn.Parameter(user.effective().detach())
        copied = self.plain.__new__(self.plain)
        memo[id(self)] = copied
        own = {key: value for key, value in vars(self).items() if key not in ("lte_parameters", "lte_head")}
        vars(copied).update(copy.deepcopy(own, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for each in self.lte_parameters.values():
            each.factors._apply(fn)  # type: ignore[no-untyped-call]
            if isinstance(each.stored, QuantizedWeight):
                each.stored._apply(fn)
            each.moved()
        return self

    def extra_repr(self) -> str:
        factors = self.lte_factors
        added = f"rank={factors.A.shape[0]}, s={factors.scaling:g}"
        plain = self.plain.extra_repr(self)
        return f"{plain}, {added}" if plain else added


def make_class(mixin: type[nn.Module], plain: type[nn.Module], kind: LayerKind, module: str) -> type[nn.Module]:
    """Creates the subclass of `plain` with the forward of `mixin`, named LTE + the plain name, in `module`."""
    attributes: dict[str, Any] = {"kind": kind, "plain": plain, "__module__": module}
    if "input" in inspect.signature(plain.forward).parameters:  # callers may pass it by keyword

        def forward(self: Any, input: Tensor) -> Any:
            return mixin.forward(self, input)

        attributes["forward"] = forward
    return type(f"LTE{plain.__name__}", (mixin, plain), attributes)


_CLASSES = {plain: make_class(HeadLayer, plain, kind, __name__) for plain, kind in TORCH_KINDS.items()}
globals().update({each.__name__: each for each in _CLASSES.values()})  # pickle finds classes by name
LTELinear = _CLASSES[nn.Linear]


def _class_of(plain: type[nn.Module], kind: LayerKind) -> type[nn.Module]:
    if plain not in _CLASSES:
        _CLASSES[plain] = make_class(HeadLayer, plain, kind, __name__)
        globals()[_CLASSES[plain].__name__] = _CLASSES[plain]
    return _CLASSES[plain]


def __getattr__(name: str) -> Any:
    """Creates the class for Conv1D of transformers, for unpickling in a process that hasn't converted one yet."""
    if name == "LTEConv1D":
        from transformers.pytorch_utils import Conv1D

        return _class_of(Conv1D, TRANSPOSED_LINEAR)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def add_factors(layer: nn.Module, parameters: dict[str, UserParameter], head: UserParameters) -> HeadLayer:
    """Turns `layer` into a `HeadLayer`, in place.

    The factors aren't among its submodules: to the user's code, the model has the modules and parameters that were built.

    Args:
        layer: one of the user's layers.
        parameters: its "weight", and its "bias" if that has factors.
        head: all of the model's.
    """
    kind = kind_of(layer)
    assert kind is not None
    vars(layer).update(lte_parameters=parameters, lte_head=head)
    layer.__class__ = _class_of(type(layer), kind)
    assert isinstance(layer, HeadLayer)
    return layer
