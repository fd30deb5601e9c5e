"""Mode "mhlora" (multi-head LoRA): all heads see all data at every step, and nothing is merged."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_ray.merging.flat_buffer import as_stored
from lte_ray.modes.base import StackedLayer
from lte_ray.modes.state_dict_compat import MHLoRACompat


class MHLoRALayer(MHLoRACompat, StackedLayer):
    """y = f(x; W, b) + (1/H) sum_h s (B_h A_h)(x): the paper's multi-head LoRA, in training and in evaluation.

    It equals LTE that merges after every step, if all heads get the same data (and SGD has H times the learning rate).
    Biases that aren't frozen, and all parameters without factors, are plain parameters that train.
    """

    merges = False
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        bias = self.head_bias(0)
        if kind.product is None:
            return kind.main(self, x, self.main_weight + self.lora.mean_vector(), bias)
        a, b = self.lora.mean_pair()
        return kind.main(self, x, self.main_weight, bias) + kind.product(self, x, a, b, 1.0)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """Does nothing: the forward pass adds the heads' mean."""

    def head_bias(self, head: int) -> Tensor | None:
        """The bias, the same for every head."""
        bias: Tensor | None = self._parameters.get("bias")
        return bias if bias is None or self.lora_bias is None else bias + self.lora_bias.mean_vector()

    def effective_weight(self, head: int) -> Tensor:
        """W + (1/H) sum_h s_h B_h A_h, the same for every head."""
        a, b = self.lora.mean_pair()
        return self.main_weight + as_stored(self.specs[0], b @ a)

    def merged_tensors(self) -> dict[str, Tensor]:
        tensors = {"weight": self.lora.weight_with_mean(self.main_weight)}
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is not None:
            tensors["bias"] = self.lora_bias.weight_with_mean(bias)
        return tensors
