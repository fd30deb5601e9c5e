"""What the layers of all in-process modes share: a class switched in place, biases, running statistics, the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lte_ray.adapters.effective_parameter import stand_in
from lte_ray.adapters.layer import LTELayer, make_class
from lte_ray.adapters.layer_kinds import TORCH_KINDS, TRANSPOSED_LINEAR, Kind
from lte_ray.layout import Adapted
from lte_ray.modes.batch_split import HEAD, check_not_recomputed, recomputing
from lte_ray.modes.parameter_guard import CALLED, refuse
from lte_ray.modes.stacked_factors import StackedFactors, on_the_wire, processes

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ModeLayer(LTELayer):
    """A layer of H heads in one process; the user's own layer, whose class is switched in place.

    `weight` and `bias` are the merged ones: they get no gradient, and evaluation uses them alone. Biases: frozen; a copy for
    each head (`bias_replicas`, H x out); or with factors of their own (`lora_bias`).

    Attributes:
        num_heads: H.
        lora_r: the largest rank.
        lora_alpha: alpha, so that scaling = alpha / r (or / sqrt(r)).
        scaling: s, or each head's where they differ.
        merged: whether `merge_parameters` was called, as a number in a buffer.
    """

    kind: ClassVar[Kind]
    plain: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[nn.Module]]
    merged: Tensor
    lora_bias: StackedFactors | None
    bias_replicas: nn.Parameter | None
    merges: ClassVar[bool] = True
    """Whether merges put what is trained into the weight, so that evaluation computes with the weight alone."""
    lte_names: set[str]
    """Names of the parameters, buffers and modules that it got beside those of the unconverted layer."""

    def take(
        self, specs: Sequence[Adapted], alpha: float, bias: StackedFactors | nn.Parameter | None, statistics: bool
    ) -> None:
        """Takes over the settings, the heads' biases (None: frozen or none), and statistics for each head if there are any."""
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
        if value is not None and name in ("weight", "bias") and self._is_used() and self._trains_beside(name, value):
            return stand_in(value, partial(self._in_use, name))
        return value

    def _is_used(self) -> bool:
        """Whether a forward runs, or what a loop or "mhlora" used in one is computed again in a backward pass."""
        return CALLED.get() or ((not self.merges or "lte_looped" in self.__dict__) and recomputing())

    def _trains_beside(self, name: str, value: Any) -> bool:
        """Whether a parameter is a merged one, in whose place something else is computed with now."""
        if value.requires_grad or not isinstance(value, nn.Parameter) or (self.merges and not self.training):
            return False
        return name == "weight" or self.lora_bias is not None or self.bias_replicas is not None

    def _in_use(self, name: str) -> Tensor:
        head = HEAD.get()
        if head is None and self.merges:
            check_not_recomputed(self)
            refuse(f"{self.specs[0].name.removesuffix('weight')}{name}")
        return self.effective(name, head or 0)

    def effective(self, name: str, head: int) -> Tensor:
        """The weight or bias that a head computes with, as one tensor."""
        bias = self.bias_of(head) if name == "bias" else None
        return self.effective_weight(head) if bias is None else bias

    def effective_weight(self, head: int) -> Tensor:
        """W + s (B A - B' A') of a head, in the stored shape."""
        raise NotImplementedError

    @property
    def main_weight(self) -> Tensor:
        """W, whoever asks."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def plain_forward(self, x: Tensor) -> Tensor:
        """What the layer computed before, with the parameters that it holds now."""
        y: Tensor = self.plain.forward(self, x)
        return y

    def bias_of(self, head: int) -> Tensor | None:
        """The bias that a head trains with."""
        bias = self._parameters.get("bias")
        if bias is None:
            return None
        if self.bias_replicas is not None:
            return self.bias_replicas[head]
        return bias if self.lora_bias is None else bias + self.lora_bias.vector(head).to(bias.device)

    def own_biases(self) -> Tensor | None:
        """All heads' biases (H x out) where they differ."""
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is not None:
            return bias + self.lora_bias.vectors()
        return self.bias_replicas

    @contextmanager
    def statistics_of(self, head: int) -> Iterator[None]:
        """Running statistics within are the head's."""
        before = {name: self._buffers[name] for name in STATISTICS if f"{name}_head{head}" in self._buffers}
        self._buffers.update({name: self._buffers[f"{name}_head{head}"] for name in before})
        try:
            yield
        finally:
            self._buffers.update(before)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """W += (1/H) sum_h s_h (B_h A_h - B'_h A'_h), the reference := the factors; biases and statistics likewise."""
        self.merge_weight()
        bias = self._parameters.get("bias")
        if self.lora_bias is not None:
            assert bias is not None
            self.lora_bias.merge_into(bias)
        elif self.bias_replicas is not None:
            assert bias is not None
            average([bias, *self.bias_replicas], of=list(self.bias_replicas))
        for name in STATISTICS:
            own = [b for h in range(self.num_heads) if (b := self._buffers.get(f"{name}_head{h}")) is not None]
            if own:
                main = self._buffers[name]
                assert main is not None
                average([main, *own], of=own, across=True)
        self.merged.fill_(1)

    def merge_weight(self) -> None:
        """The main weight's part of `merge_parameters`."""
        raise NotImplementedError

    def reset_lora_parameters(self) -> None:
        """A drawn anew, B := 0, reference := 0: what was merged stays in W, what wasn't is dropped."""
        if self.lora_bias is not None:
            self.lora_bias.draw()

    def merged_tensors(self) -> dict[str, Tensor]:
        """What of the layer's own state differs from what evaluation computes with; nothing unless a mode never merges."""
        return {}

    def extra_repr(self) -> str:
        ranks = [s.rank for s in self.specs]
        rank = ranks[0] if len(set(ranks)) == 1 else tuple(ranks)
        own = f"heads={self.num_heads}, rank={rank}, s={self.scaling}"
        theirs = self.plain.extra_repr(self)
        return f"{theirs}, {own}" if theirs else own

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (self.mixin, self.plain), self.__dict__


class StackedLayer(ModeLayer):
    """A layer whose heads' factors are one `Stack`."""

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
        self.lora.draw()
        super().reset_lora_parameters()


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def class_of(mixin: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of `plain` layers in the mode of `mixin`."""
    if (mixin, plain) not in _CLASSES:
        made: Any = make_class(mixin, plain, TORCH_KINDS.get(plain, TRANSPOSED_LINEAR), mixin.__module__)
        made.mixin = mixin
        _CLASSES[mixin, plain] = made
    return _CLASSES[mixin, plain]


def blank(mixin: type[nn.Module], plain: type[nn.Module]) -> nn.Module:
    """A layer without any state, for pickle: the classes themselves can't be found by name."""
    made = class_of(mixin, plain)
    return made.__new__(made)


@torch.no_grad()
def average(tensors: Sequence[Tensor], of: Sequence[Tensor], across: bool = False) -> None:
    """Sets all `tensors` to the mean of those in `of`, computed in float32 at least; integers to the first.

    Args:
        across: the mean over all processes of `torch.distributed` too. Gradients, and so parameters, are alike in them, but
            running statistics are those of each one's data.
    """
    if not of[0].is_floating_point():
        mean = of[0].clone()
    else:
        dtype = torch.promote_types(of[0].dtype, torch.float32)
        mean = torch.stack([t.detach().to(tensors[0].device, dtype) for t in of]).mean(0)
        if across and processes() > 1:
            sent = on_the_wire(mean)
            dist.all_reduce(sent)
            mean = sent / processes()
    for tensor in tensors:
        tensor.copy_(mean)
