"""Mode "ddp": one main weight for all heads, whose factors are stacked and multiplied in one product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import as_stored
from lte_ray.modes.base import StackedLayer, check_input
from lte_ray.modes.batch_split import ACTIVE_HEAD
from lte_ray.modes.state_dict_compat import DDPCompat


class DDPLayer(DDPCompat, StackedLayer):
    """y_h = f(x_h; W, b) + s (B_h A_h - B'_h A'_h)(x_h) for x = [x_1; ...; x_H], the batch cut along its first dimension.

    The reference A', B' is what W holds of the head. It isn't folded into W: one product of [B, -B'] and [A; A'] computes
    both terms. In evaluation y = f(x; W, b).

    The mean of a loss over the whole batch gives each head 1/H of the gradient of its own mean loss. Adam is invariant to
    that; SGD needs H times the learning rate.
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
        head = ACTIVE_HEAD.get()
        if head is not None:
            return self._forward_head(x, head)
        check_input(self, x)
        if self.kind.product is None:
            return torch.cat([self._forward_head(part, head) for head, part in enumerate(x.chunk(self.num_heads))])
        biases = self.all_head_biases()
        y = self.kind.main(self, x, self.main_weight, self._parameters.get("bias") if biases is None else None)
        if biases is not None:
            y = _add_biases(y, biases, 1 if self.kind.name == "conv" else y.dim() - 1)
        return self._add_linear(y, x) if self.kind.name == "linear" else self._add_by_vmap(y, x)

    def _forward_head(self, x: Tensor, head: int) -> Tensor:
        """One head's output for its part of the input."""
        kind, bias = self.kind, self.head_bias(head)
        if kind.product is None:
            with self.head_statistics(head):
                return kind.main(self, x, self.main_weight + self.lora.vector_change(head), bias)
        a, b = self.lora.signed_pair(head)
        return kind.main(self, x, self.main_weight, bias) + kind.product(self, x, a, b, self.specs[head].scaling)

    def _add_linear(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s (x A^T) B^T as two batched products over heads."""
        a, b = self.lora.signed_pairs()
        hidden = self.lora.scale(torch.bmm(x.reshape(self.num_heads, -1, x.shape[-1]), a.mT))
        result: Tensor = torch.baddbmm(y.reshape(self.num_heads, -1, y.shape[-1]), hidden, b.mT)
        return result.view(y.shape)

    def _add_by_vmap(self, y: Tensor, x: Tensor) -> Tensor:
        """y + the layer kind's product, mapped over heads."""
        product: Callable[..., Tensor] | None = self.kind.product
        assert product is not None
        a, b = self.lora.signed_pairs()
        if self.kind.name == "embedding":  # vmap would lose padding_idx, whose row gets no gradient
            s = [spec.scaling for spec in self.specs]
            heads = zip(x.chunk(self.num_heads), a, b, s, strict=True)
            return y + torch.cat([product(self, *arguments) for arguments in heads])
        same_scale = isinstance(self.scaling, float)  # otherwise scale B: vmap would round the scales to the type of x
        parts: Tensor = torch.func.vmap(partial(product, self, s=self.scaling if same_scale else 1.0))(
            x.reshape(self.num_heads, -1, *x.shape[1:]), a, b if same_scale else self.lora.scale(b)
        )
        return y + parts.flatten(0, 1)

    def merge_weight(self) -> None:
        self.lora.merge_into(self.main_weight)

    def effective_weight(self, head: int) -> Tensor:
        a, b = self.lora.signed_pair(head)
        return self.main_weight + as_stored(self.specs[head], b @ a) * self.specs[head].scaling


def _add_biases(y: Tensor, biases: Tensor, dim: int) -> Tensor:
    """Adds to each head's part of y its bias (biases: H x out), which runs along dimension `dim` of y."""
    parts = y.reshape(len(biases), -1, *y.shape[1:])
    shape = [len(biases), *[1] * (parts.dim() - 1)]
    shape[dim + 1] = biases.shape[1]
    return (parts + biases.to(y.dtype).view(shape)).flatten(0, 1)
