"""One head's layers: the user's own layers, in place, with factors added to the main weight."""

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
    """Base class of all layers with factors, in every mode: `isinstance(layer, LTELayer)` finds them."""


class HeadLayer(LTELayer):
    """y = f(x; W~, b) + s (B A)(x): a layer of one head (LTE, arXiv 2402.16828, eq. 5-6).

    W~ = W_v - s B' A' is the head's own copy of the main weight: base version v minus what v already contains of this head (the
    reference A', B'). It gets no gradient. It remains a parameter with the same name, and so does the bias. If the main weight
    is shared or quantized, W~ = W_v, and the reference's product is computed separately (`Factors`).

    `add_factors` turns a layer into a `HeadLayer` by changing its class, so that its attributes, hooks and all references to it
    remain.
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
        """Computes what the layer computed before it had factors, with its current parameters."""
        with computing_loss(False):  # it reads its parameters itself, which are already the effective ones
            y: Tensor = self.plain.forward(self, x)
        return y

    def _raw_weight(self) -> Tensor:
        """Returns the main weight itself, for which other readers get an `EffectiveParameter` while a loss is computed."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _effective_weight(self) -> Tensor:
        """Returns W~ + s B A (- s B' A') in the stored shape: the weight that the layer's output corresponds to."""
        stored = self._stored("weight")
        if self.kind.product is None:
            return stored + self.lora.vector_change()
        a, b = self.lora.effective_pair()
        product = (b @ a) * self.lora.scaling
        return stored + (product.t() if self.kind.transposed else product.reshape(stored.shape))

    def _stored(self, name: str) -> Tensor:
        """Returns the parameter with this name; a quantized weight, dequantized."""
        quantized = self._modules.get("quantized")
        if name == "weight" and isinstance(quantized, QuantizedWeight):
            weight = quantized.dequantize(self.lora.A.dtype)
            return weight.t() if self.kind.transposed else weight
        parameter: Any = super().__getattr__(name)
        return parameter  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return (
                effective_parameter(self._stored(name), self._effective_weight) if COMPUTING_LOSS.get() else self._stored(name)
            )
        if name == "bias" and COMPUTING_LOSS.get() and (lora := self._modules.get("lora_bias")) is not None:
            stored = self._stored(name)
            return effective_parameter(stored, lambda: stored + lora.vector_change())  # type: ignore[operator]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        added = f"rank={self.lora.A.shape[0]}, s={self.lora.scaling:g}"
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


def add_factors(layer: nn.Module, lora: Factors, lora_bias: Factors | None) -> HeadLayer:
    """Turns `layer` into a `HeadLayer` with these factors, in place; its main weight no longer gets a gradient."""
    kind = kind_of(layer)
    assert kind is not None
    layer.__class__ = _class_of(type(layer), kind)
    assert isinstance(layer, HeadLayer)
    layer.weight.requires_grad_(False)
    layer.lora, layer.lora_bias = lora, lora_bias
    return layer


@torch.no_grad()
def quantize_weight(layer: HeadLayer, quantized: QuantizedWeight) -> None:
    """Replaces the layer's main weight by a quantized one, in the shape of the matrix or of the weight."""
    del layer._parameters["weight"]
    layer.quantized = quantized
