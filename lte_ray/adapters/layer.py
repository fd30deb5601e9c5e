"""One head's layers: the user's own layers, which go on being what they were, with factors beside the main weight."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lte_ray.adapters.effective_parameter import COMPUTING_LOSS, computing_loss, effective_parameter
from lte_ray.adapters.factors import Factors
from lte_ray.adapters.layer_kinds import TORCH_KINDS, TRANSPOSED_LINEAR, LayerKind, kind_of
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.adapters.quantization import linear as quantized_linear


class LTELayer(nn.Module):
    """What all layers with factors are, in every mode: `isinstance(layer, LTELayer)` finds them."""


class HeadLayer(LTELayer):
    """y = f(x; W~, b) + s (B A)(x): a layer of one head (LTE, arXiv 2402.16828, eq. 5-6).

    W~ = W_v - s B' A' is the head's own copy of the main weight: base version v less what v already holds of this head
    (the reference A', B'). It gets no gradient. It stays a parameter under the same name, and so does the bias. Where the
    main weight is shared or quantised, W~ = W_v and the reference is computed beside it (`Factors`).

    A layer becomes one by `adopt`, which changes its class; attributes, hooks and all places that hold it stay.
    """

    kind: ClassVar[LayerKind]
    plain: ClassVar[type[nn.Module]]
    lora: Factors
    lora_bias: Factors | None

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        bias: Tensor | None = self._parameters.get("bias")
        if self.lora_bias is not None:
            assert bias is not None
            bias = bias + self.lora_bias.vector_change()
        if kind.product is None:
            return kind.main(self, x, self._raw_weight() + self.lora.vector_change(), bias)
        a, b = self.lora.effective_pair()
        return self._main_output(x, bias) + kind.product(self, x, a, b, self.lora.scaling)

    def _main_output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        quantized = self._modules.get("quantized")
        if not isinstance(quantized, QuantizedWeight):
            return self.kind.main(self, x, self._raw_weight(), bias)
        if self.kind.name == "linear":
            return quantized_linear(x, quantized, bias)
        dtype = self.lora.A.dtype if self.kind.name == "embedding" else x.dtype
        return self.kind.main(self, x, quantized.dequantize(dtype), bias)

    def plain_forward(self, x: Tensor) -> Tensor:
        """What the layer computed before it had factors, with the parameters that it holds now."""
        with computing_loss(False):  # it reads the parameters itself, which are the ones in use now
            y: Tensor = self.plain.forward(self, x)
        return y

    def _raw_weight(self) -> Tensor:
        """The main weight itself, which others don't get while a loss is computed."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _effective_weight(self) -> Tensor:
        """W~ + s B A (- s B' A'), in the stored shape: what the layer's output is made with."""
        held = self._stored("weight")
        if self.kind.product is None:
            return held + self.lora.vector_change()
        a, b = self.lora.effective_pair()
        product = (b @ a) * self.lora.scaling
        return held + (product.t() if self.kind.transposed else product.reshape(held.shape))

    def _stored(self, name: str) -> Tensor:
        """What the layer holds under a parameter's name; a quantised weight as it is unpacked."""
        quantized = self._modules.get("quantized")
        if name == "weight" and isinstance(quantized, QuantizedWeight):
            weight = quantized.dequantize(self.lora.A.dtype)
            return weight.t() if self.kind.transposed else weight
        held: Any = super().__getattr__(name)
        return held  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return (
                effective_parameter(self._stored(name), self._effective_weight) if COMPUTING_LOSS.get() else self._stored(name)
            )
        if name == "bias" and COMPUTING_LOSS.get() and (lora := self._modules.get("lora_bias")) is not None:
            held = self._stored(name)
            return effective_parameter(held, lambda: held + lora.vector_change())  # type: ignore[operator]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        own = f"rank={self.lora.A.shape[0]}, s={self.lora.scaling:g}"
        theirs = self.plain.extra_repr(self)
        return f"{theirs}, {own}" if theirs else own


def make_class(mixin: type[nn.Module], plain: type[nn.Module], kind: LayerKind, module: str) -> type[nn.Module]:
    """The class of `plain` layers with `mixin`'s forward; named LTE + the plain name, in `module`."""
    attributes: dict[str, Any] = {"kind": kind, "plain": plain, "__module__": module}
    if "input" in inspect.signature(plain.forward).parameters:  # whoever calls the layer by keyword still can

        def forward(self: Any, input: Tensor) -> Any:
            return mixin.forward(self, input)

        attributes["forward"] = forward
    return type(f"LTE{plain.__name__}", (mixin, plain), attributes)


_CLASSES = {plain: make_class(HeadLayer, plain, kind, __name__) for plain, kind in TORCH_KINDS.items()}
globals().update({made.__name__: made for made in _CLASSES.values()})  # pickle finds classes by name
LTELinear = _CLASSES[nn.Linear]


def _class_of(plain: type[nn.Module], kind: LayerKind) -> type[nn.Module]:
    if plain not in _CLASSES:
        _CLASSES[plain] = make_class(HeadLayer, plain, kind, __name__)
        globals()[_CLASSES[plain].__name__] = _CLASSES[plain]
    return _CLASSES[plain]


def __getattr__(name: str) -> Any:
    """The class of transformers' Conv1D, for pickle in a process that hasn't converted one yet."""
    if name == "LTEConv1D":
        from transformers.pytorch_utils import Conv1D

        return _class_of(Conv1D, TRANSPOSED_LINEAR)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def add_factors(layer: nn.Module, lora: Factors, lora_bias: Factors | None) -> HeadLayer:
    """Makes `layer` a layer of a head, in place, with these factors; its main weight gets no gradient any more."""
    kind = kind_of(layer)
    assert kind is not None
    layer.__class__ = _class_of(type(layer), kind)
    assert isinstance(layer, HeadLayer)
    layer.weight.requires_grad_(False)
    layer.lora, layer.lora_bias = lora, lora_bias
    return layer


@torch.no_grad()
def quantize_weight(layer: HeadLayer, quantized: QuantizedWeight) -> None:
    """Puts a quantised main weight (stored as the matrix or as the weight's own shape) in the place of the parameter."""
    del layer._parameters["weight"]
    layer.quantized = quantized
