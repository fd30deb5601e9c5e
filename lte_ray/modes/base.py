"""What the layers of all in-process modes share: classes switched in place, biases, running statistics, merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lte_ray.adapters.layer import LTELayer, make_class
from lte_ray.adapters.layer_kinds import TORCH_KINDS, TRANSPOSED_LINEAR, LayerKind
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted
from lte_ray.modes.arithmetic import set_to_mean
from lte_ray.modes.batch_split import (
    ACTIVE_HEAD,
    check_divisible,
    check_not_positions,
    check_not_recomputed,
    in_backward,
)
from lte_ray.modes.effective_parameter import effective_parameter
from lte_ray.modes.parameter_guard import MODEL_RUNNING, refuse_use
from lte_ray.modes.stacked_factors import StackedFactors

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ModeLayer(LTELayer):
    """A layer of H heads in one process: the user's own layer, whose class is changed in place.

    `weight` and `bias` are the merged ones: they get no gradient, and evaluation uses only them. The bias is frozen, has a
    copy for each head (`bias_replicas`, H x out), or has factors of its own (`lora_bias`).

    Attributes:
        num_heads: H.
        lora_r: the largest rank.
        lora_alpha: alpha; scaling = alpha / r (rsLoRA: alpha / sqrt(r)).
        scaling: s, or a tuple of each head's s if they differ.
        merged: 1 once `merge_parameters` was called, else 0; a buffer of one number.
    """

    kind: ClassVar[LayerKind]
    plain: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[nn.Module]]
    merged: Tensor
    lora_bias: StackedFactors | None
    bias_replicas: nn.Parameter | None
    merges: ClassVar[bool] = True
    """Whether merges add what heads learn to the weight, so that evaluation computes with the weight alone."""
    lte_added_names: set[str]
    """Names of the parameters, buffers, and modules that the unconverted layer lacks."""

    def configure(
        self, specs: Sequence[Adapted], alpha: float, bias: StackedFactors | nn.Parameter | None, statistics: bool
    ) -> None:
        """Sets the heads' settings and biases (None: frozen or absent); `statistics`: heads keep running statistics."""
        self.specs, self.num_heads = tuple(specs), len(specs)
        self.lora_r, self.lora_alpha = max(s.rank for s in specs), alpha
        scalings = tuple(s.scaling for s in specs)
        self.scaling = scalings[0] if len(set(scalings)) == 1 else scalings
        weight = self._parameters["weight"]
        assert weight is not None
        weight.requires_grad_(False)
        self.register_buffer("merged", weight.new_zeros(1))
        self.lora_bias = bias if isinstance(bias, StackedFactors) else None
        self.register_parameter("bias_replicas", bias if isinstance(bias, nn.Parameter) else None)
        for name in STATISTICS if statistics and self.kind.product is None else ():
            value = self._buffers.get(name)
            for head in range(self.num_heads) if value is not None else ():
                self.register_buffer(f"{name}_head{head}", value.clone())  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if value is not None and name in ("weight", "bias") and self._in_forward() and self._differs_by_head(name, value):
            if not self.merges:  # a tensor also for code that isn't torch's own
                return self._resolve_parameter(name)
            return effective_parameter(value, partial(self._resolve_parameter, name))
        return value

    def _in_forward(self) -> bool:
        """Whether a forward runs, or the backward pass recomputes part of one that a loop over heads or "mhlora" ran."""
        return MODEL_RUNNING.get() or ((not self.merges or "lte_looped" in self.__dict__) and in_backward())

    def _differs_by_head(self, name: str, value: Any) -> bool:
        """Whether `value` is a merged parameter that heads currently replace by something else."""
        if value.requires_grad or not isinstance(value, nn.Parameter) or (self.merges and not self.training):
            return False
        return name == "weight" or self.lora_bias is not None or self.bias_replicas is not None

    def _resolve_parameter(self, name: str) -> Tensor:
        """The active head's weight or bias. Raises ConfigError if no head is active, except in "mhlora"."""
        head = ACTIVE_HEAD.get()
        if head is None and self.merges:
            check_not_recomputed(self)
            refuse_use(f"{self.specs[0].name.removesuffix('weight')}{name}")
        return self.effective_parameter(name, head or 0)

    def effective_parameter(self, name: str, head: int) -> Tensor:
        """The weight or bias that a head computes with, as one tensor."""
        bias = self.head_bias(head) if name == "bias" else None
        return self.effective_weight(head) if bias is None else bias

    def effective_weight(self, head: int) -> Tensor:
        """W + s (B A - B' A') of a head, in the stored shape."""
        raise NotImplementedError

    @property
    def main_weight(self) -> Tensor:
        """W, also while `weight` gives a stand-in."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def plain_forward(self, x: Tensor) -> Tensor:
        """What the unconverted layer computes with the current parameters."""
        y: Tensor = self.plain.forward(self, x)
        return y

    def head_bias(self, head: int) -> Tensor | None:
        """The bias that a head trains with."""
        bias = self._parameters.get("bias")
        if bias is None:
            return None
        if self.bias_replicas is not None:
            return self.bias_replicas[head]
        return bias if self.lora_bias is None else bias + self.lora_bias.vector_change(head).to(bias.device)

    def all_head_biases(self) -> Tensor | None:
        """All heads' biases (H x out), or None if they don't differ."""
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is not None:
            return bias + self.lora_bias.vector_changes()
        return self.bias_replicas

    @contextmanager
    def head_statistics(self, head: int) -> Iterator[None]:
        """Within the block, the layer's running statistics are the head's."""
        before = {name: self._buffers[name] for name in STATISTICS if f"{name}_head{head}" in self._buffers}
        self._buffers.update({name: self._buffers[f"{name}_head{head}"] for name in before})
        try:
            yield
        finally:
            self._buffers.update(before)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """W += (1/H) sum_h s_h (B_h A_h - B'_h A'_h), reference := factors; biases and statistics likewise."""
        self.merge_weight()
        bias = self._parameters.get("bias")
        if self.lora_bias is not None:
            assert bias is not None
            self.lora_bias.merge_into(bias)
        elif self.bias_replicas is not None:
            assert bias is not None
            set_to_mean([bias, *self.bias_replicas], list(self.bias_replicas))
        for name in STATISTICS:
            by_head = [b for h in range(self.num_heads) if (b := self._buffers.get(f"{name}_head{h}")) is not None]
            if by_head:
                main = self._buffers[name]
                assert main is not None
                set_to_mean([main, *by_head], by_head, across_processes=True)
        self.merged.fill_(1)

    def merge_weight(self) -> None:
        """The part of `merge_parameters` that concerns W."""
        raise NotImplementedError

    def reset_lora_parameters(self) -> None:
        """Draws A again; B and the reference become zero. W keeps what was merged; what wasn't is lost."""
        if self.lora_bias is not None:
            self.lora_bias.redraw()

    def merged_tensors(self) -> dict[str, Tensor]:
        """Tensors of the merged state that differ from the stored ones, by name: none unless the mode never merges."""
        return {}

    def extra_repr(self) -> str:
        ranks = [s.rank for s in self.specs]
        rank = ranks[0] if len(set(ranks)) == 1 else tuple(ranks)
        settings = f"heads={self.num_heads}, rank={rank}, s={self.scaling}"
        plain = self.plain.extra_repr(self)
        return f"{plain}, {settings}" if plain else settings

    def __reduce__(self) -> tuple[Any, ...]:
        return make_blank, (self.mixin, self.plain), self.__dict__


class StackedLayer(ModeLayer):
    """A layer whose heads' factors are one `StackedFactors`."""

    lora: StackedFactors

    @property
    def lora_A_weight(self) -> Tensor:  # noqa: N802
        """A of all heads (H x r x in)."""
        return self.lora.lora_A_weight

    @property
    def lora_B_weight(self) -> Tensor:  # noqa: N802
        """B of all heads (H x out x r)."""
        return self.lora.lora_B_weight

    def reset_lora_parameters(self) -> None:
        self.lora.redraw()
        super().reset_lora_parameters()


def check_input(layer: ModeLayer, x: Tensor) -> None:
    """Raises ConfigError unless the input (batch, ...) can be split over the heads of `layer`."""
    check_not_recomputed(layer)
    least_dims = {"linear": 2, "conv": len(getattr(layer, "kernel_size", ())) + 2}.get(layer.kind.name, 1)
    where = layer.specs[0].name.removesuffix(".weight")
    if x.dim() < least_dims:
        raise ConfigError(
            f"{where} got an input of shape {tuple(x.shape)}, which has no batch dimension to split over heads. Put the "
            "batch first, or use chunk='model' in prepare_model_for_lte."
        )
    check_divisible(x.shape[0], layer.num_heads, where, must_be_batch=layer.kind.name == "embedding")
    if layer.kind.name == "embedding":
        check_not_positions(x, where)


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mode_class(mixin: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of layers of class `plain` in the mode of `mixin`."""
    if (mixin, plain) not in _CLASSES:
        new: Any = make_class(mixin, plain, TORCH_KINDS.get(plain, TRANSPOSED_LINEAR), mixin.__module__)
        new.mixin = mixin
        _CLASSES[mixin, plain] = new
    return _CLASSES[mixin, plain]


def make_blank(mixin: type[nn.Module], plain: type[nn.Module]) -> nn.Module:
    """A layer without any state, for pickle: the classes can't be found by name."""
    new = mode_class(mixin, plain)
    return new.__new__(new)
