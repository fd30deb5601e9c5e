"""What a layer of each kind computes with its main weight and with a low-rank product.

Each kind is a record of pure functions of (layer, input, tensors), so that one head's layer and all in-process modes compute
the same, and so that `torch.func.vmap` can batch over heads. `layer` provides what isn't a tensor: stride, groups, eps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: its name in `LTEConfig.adapt`.
        main: (layer, x, weight, bias) -> the layer's output with this weight and bias.
        product: (layer, x, a, b, s) -> what s B A adds to the output, with A (r x in), B (out x r). None if the weight is a
            vector: then `main` runs on weight + s B A.
        transposed: whether the weight is stored as in x out.
    """

    name: str
    main: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    product: Callable[[Any, Tensor, Tensor, Tensor, float], Tensor] | None
    transposed: bool = False


def _linear(layer: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_product(layer: Any, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Returns s (x A^T) B^T; x is (..., in), the result (..., out)."""
    return F.linear(F.linear(x, a) * s, b)


def _transposed_linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W + b with W (in x out), as the Conv1D layer of transformers does."""
    y = x.reshape(-1, x.shape[-1])
    y = y @ weight if bias is None else torch.addmm(bias, y, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def _conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = layer._conv_forward(x, weight, bias)  # torch's own, with the layer's padding mode, stride and groups
    return y


def _conv_product(layer: Any, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Convolves with the kernel A (r x in/groups x k...), then with B as a 1 x 1 kernel.

    A group of outputs sees only its own inputs, so A runs over each group of inputs: the r channels of group g, mixed by its
    rows of B, equal the convolution with these rows of B A.
    """
    kernel = a.reshape(a.shape[0], -1, *layer.kernel_size)
    kernel = kernel.repeat(layer.groups, *[1] * (kernel.ndim - 1))
    hidden = layer._conv_forward(x, kernel, None) * s
    mix = b.reshape(*b.shape, *[1] * len(layer.kernel_size))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    return convolve(hidden, mix, groups=layer.groups)


def _embedding(layer: nn.Embedding, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(x, weight, layer.padding_idx)


def _embedding_product(layer: nn.Embedding, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Returns s B[x] A: rows of B (vocabulary x r) times A (r x width). The padding row has no gradient, in A either."""
    if layer.padding_idx is None:
        return F.linear(F.embedding(x, b) * s, a.t())
    is_padding = (x == layer.padding_idx).unsqueeze(-1)
    hidden = F.embedding(x, b, layer.padding_idx) * s
    padding = F.linear(b[layer.padding_idx].detach() * s, a.t().detach())  # not 0 if other layers train this row
    return torch.where(is_padding, padding, F.linear(hidden.masked_fill(is_padding, 0), a.t()))


def _norm(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Runs the layer's own forward with these affine parameters; the layer updates its running statistics itself."""
    own = vars(layer)["_parameters"]
    before = {name: own[name] for name in ("weight", "bias") if name in own}
    own.update({name: value for name, value in (("weight", weight), ("bias", bias)) if name in before})
    try:
        y: Tensor = layer.plain_forward(x)
    finally:
        own.update(before)
    return y


LINEAR = LayerKind("linear", _linear, _linear_product)
TRANSPOSED_LINEAR = LayerKind("linear", _transposed_linear, _linear_product, transposed=True)
CONV = LayerKind("conv", _conv, _conv_product)
EMBEDDING = LayerKind("embedding", _embedding, _embedding_product)
NORM = LayerKind("norm", _norm, None)

TORCH_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: NORM,
    nn.RMSNorm: NORM,
    nn.GroupNorm: NORM,
    nn.BatchNorm1d: NORM,
    nn.BatchNorm2d: NORM,
    nn.BatchNorm3d: NORM,
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """Returns the kind of a layer that can have factors, None for others.

    Accepts exact types only: a subclass may use its weight without calling `forward`, or compute something else. So may a layer
    whose instance has its own `forward`.
    """
    if "forward" in vars(module):
        return None
    kind = TORCH_KINDS.get(type(module))
    if kind is None:
        transformers = sys.modules.get("transformers.pytorch_utils")  # without this import, the model has none of its layers
        if transformers is not None and type(module) is transformers.Conv1D:
            return TRANSPOSED_LINEAR
        return None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None  # its forward modifies the weight, or its gradients aren't those of a product
    if kind is NORM and (getattr(module, "weight", None) is None or module.weight.ndim != 1):
        return None
    return kind
