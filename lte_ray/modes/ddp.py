"""Mode "ddp": one main weight for all heads, whose factors are stacked and multiplied at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.merging.flat_buffer import as_stored
from lte_ray.modes.base import ModeLayer, StackedLayer
from lte_ray.modes.batch_split import HEAD, check_batch, check_indices, check_not_recomputed
from lte_ray.modes.state_dict_compat import DDPNames


def check_input(layer: ModeLayer, x: Tensor) -> None:
    """Raises ConfigError unless the input (batch, ...) can be shared out over the heads of `layer`."""
    check_not_recomputed(layer)
    least = {"linear": 2, "conv": len(getattr(layer, "kernel_size", ())) + 2}.get(layer.kind.name, 1)
    where = layer.specs[0].name.removesuffix(".weight")
    if x.dim() < least:
        raise ConfigError(
            f"{where} got an input of shape {tuple(x.shape)}, which has no batch dimension to share out over heads. Put a "
            "batch first, or use chunk='model' in prepare_model_for_lte."
        )
    check_batch(x.shape[0], layer.num_heads, where, exactly=layer.kind.name == "embedding")
    if layer.kind.name == "embedding":
        check_indices(x, where)


class DDPLayer(DDPNames, StackedLayer):
    """y_h = f(x_h; W, b) + s (B_h A_h - B'_h A'_h)(x_h) for x = [x_1; ...; x_H], the batch cut along its first dimension.

    The reference A', B' is what W holds of the head. It is computed beside W, not folded into it: one product of
    [B, -B'] and [A; A'] does it. In evaluation y = f(x; W, b).

    The mean of a loss over the whole batch gives each head 1/H of the gradient of its own mean loss. Adam doesn't see that;
    SGD needs H times the learning rate.
    """

    weight: Tensor

    @property
    def prev_lora_A_weight(self) -> Tensor:  # noqa: N802
        """A' of all heads."""
        return self.lora.prev_lora_A_weight

    @property
    def prev_lora_B_weight(self) -> Tensor:  # noqa: N802
        """B' of all heads."""
        return self.lora.prev_lora_B_weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.kind.main(self, x, self.main_weight, self._parameters.get("bias"))
        head = HEAD.get()
        if head is not None:
            return self._one(x, head)
        check_input(self, x)
        if self.kind.product is None:
            return torch.cat([self._one(part, head) for head, part in enumerate(x.chunk(self.num_heads))])
        own = self.own_biases()
        y = self.kind.main(self, x, self.main_weight, self._parameters.get("bias") if own is None else None)
        if own is not None:
            y = _add_biases(y, own, 1 if self.kind.name == "conv" else y.dim() - 1)
        return self._add_linear(y, x) if self.kind.name == "linear" else self._add_mapped(y, x)

    def _one(self, x: Tensor, head: int) -> Tensor:
        """One head's output on its input."""
        kind, bias = self.kind, self.bias_of(head)
        if kind.product is None:
            with self.statistics_of(head):
                return kind.main(self, x, self.main_weight + self.lora.vector(head), bias)
        a, b = self.lora.pair(head)
        return kind.main(self, x, self.main_weight, bias) + kind.product(self, x, a, b, self.specs[head].scaling)

    def _add_linear(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s (x A^T) B^T as two batched products over heads."""
        a, b = self.lora.pairs()
        hidden = self.lora.scaled(torch.bmm(x.reshape(self.num_heads, -1, x.shape[-1]), a.mT))
        added: Tensor = torch.baddbmm(y.reshape(self.num_heads, -1, y.shape[-1]), hidden, b.mT)
        return added.view(y.shape)

    def _add_mapped(self, y: Tensor, x: Tensor) -> Tensor:
        """y + the kind's product, mapped over heads."""
        product: Callable[..., Tensor] | None = self.kind.product
        assert product is not None
        a, b = self.lora.pairs()
        if self.kind.name == "embedding":  # vmap would forget padding_idx, whose row gets no gradient
            s = [spec.scaling for spec in self.specs]
            return y + torch.cat([product(self, *own) for own in zip(x.chunk(self.num_heads), a, b, s, strict=True)])
        alike = isinstance(self.scaling, float)  # else in B: vmap would round a scale to the type of x
        parts: Tensor = torch.func.vmap(partial(product, self, s=self.scaling if alike else 1.0))(
            x.reshape(self.num_heads, -1, *x.shape[1:]), a, b if alike else self.lora.scaled(b)
        )
        return y + parts.flatten(0, 1)

    def merge_weight(self) -> None:
        self.lora.merge_into(self.main_weight)

    def effective_weight(self, head: int) -> Tensor:
        a, b = self.lora.pair(head)
        return self.main_weight + as_stored(self.specs[head], b @ a) * self.specs[head].scaling


def _add_biases(y: Tensor, biases: Tensor, at: int) -> Tensor:
    """y with each head's part increased by its bias (H x out), which runs along dimension `at`."""
    parts = y.reshape(len(biases), -1, *y.shape[1:])
    shape = [len(biases), *[1] * (parts.dim() - 1)]
    shape[at + 1] = biases.shape[1]
    return (parts + biases.to(y.dtype).view(shape)).flatten(0, 1)
