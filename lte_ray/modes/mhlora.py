"""Mode "mhlora": all heads work on all data at every step, and nothing is merged (multi-head LoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import as_stored
from lte_ray.modes.base import StackedLayer
from lte_ray.modes.stacked_factors import StackedFactors, averaged
from lte_ray.modes.state_dict_compat import MHLoRANames


class MHLoRALayer(MHLoRANames, StackedLayer):
    """y = f(x; W, b) + (1/H) sum_h s (B_h A_h)(x): the paper's multi-head LoRA, in training and in evaluation.

    It is LTE with a merge after every step whose heads all get the same data (and SGD with H times the learning rate).
    Biases that aren't frozen, and everything without factors, are plain parameters that train.
    """

    merges = False
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        bias = self.bias_of(0)
        if kind.product is None:
            return kind.main(self, x, self.main_weight + _vector(self.lora), bias)
        a, b = self.lora.average()
        return kind.main(self, x, self.main_weight, bias) + kind.product(self, x, a, b, 1.0)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """Does nothing: the heads' sum counts as it is."""

    def bias_of(self, head: int) -> Tensor | None:
        """The bias, the same for every head."""
        bias: Tensor | None = self._parameters.get("bias")
        return bias if bias is None or self.lora_bias is None else bias + _vector(self.lora_bias)

    def effective_weight(self, head: int) -> Tensor:
        """W + (1/H) sum_h s_h B_h A_h, the same for every head."""
        a, b = self.lora.average()
        return self.main_weight + as_stored(self.specs[0], b @ a)

    def merged_tensors(self) -> dict[str, Tensor]:
        merged = {"weight": averaged(self.specs[0], self.main_weight, self.lora)}
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is not None:
            merged["bias"] = averaged(self.lora_bias.specs[0], bias, self.lora_bias)
        return merged


def _vector(stack: StackedFactors) -> Tensor:
    """(1/H) sum_h s_h B_h A_h of a weight that is a vector."""
    a, b = stack.average()
    return (b @ a)[:, 0]
