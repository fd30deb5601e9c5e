"""Mode "dmp": a copy of the main weight for each head, spread over all visible devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_stored
from lte_ray.merging.low_rank import fold_reference
from lte_ray.modes.arithmetic import DrawState, add_to_weight, are_equal, draw_head_a, without_autocast
from lte_ray.modes.base import STATISTICS, check_input
from lte_ray.modes.batch_split import ACTIVE_HEAD
from lte_ray.modes.state_dict_compat import DMPCompat


def head_device(head: int, main_device: torch.device) -> torch.device:
    """A head's device: round robin over the visible CUDA devices, or `main_device` if that isn't a CUDA device."""
    return torch.device("cuda", head % torch.cuda.device_count()) if main_device.type == "cuda" else main_device


class HeadWeight(nn.Module):
    """One head's W~ = W - s B' A', in the stored shape; it gets no gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """The head's bias, which the layer holds."""
        biases: Tensor | None
        biases, head = self.__dict__["biases"]
        return biases if biases is None or head is None else biases[head]


class HeadFactor(nn.Module):
    """One head's A (r x in) or B (out x r) as `weight`, and as `reference` what the main weight holds of it."""

    reference: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("reference", torch.zeros_like(weight))


class HeadCopies:
    """The heads' copies and factors of one main weight. Layers that share the weight share them.

    Args:
        specs: each head's entry in its plan.
        weight: the main weight.
        seed: seed of the draw of A, which is the same as that of Ray heads.
        reset: "B" if a merge sets B to zero.
    """

    def __init__(self, specs: Sequence[Adapted], weight: Tensor, seed: int, reset: str) -> None:
        self.specs, self.reset, self.draws = tuple(specs), reset, DrawState(seed, weight.device)
        devices = [head_device(head, weight.device) for head in range(len(specs))]
        like = [weight.detach().to(device) for device in devices]
        self.layers = nn.ModuleList(HeadWeight(w) for w in like)
        self.lora_A = nn.ModuleList(
            HeadFactor(draw_head_a(s, seed, head, 0).to(w)) for head, (w, s) in enumerate(zip(like, specs, strict=True))
        )
        self.lora_B = nn.ModuleList(HeadFactor(w.new_zeros(s.matrix[0], s.rank)) for w, s in zip(like, specs, strict=True))


class DMPLayer(DMPCompat):
    """y_h = f(x_h; W~_h, b_h) + s (B_h A_h)(x_h), where W~_h = W - s B'_h A'_h is the head's own copy.

    Each head computes what a Ray head computes, on the device of its copy, so that several CUDA devices work at once. In
    evaluation y = f(x; W, b). A merge adds products of factors to W; no head's dense change is ever formed.

    Attributes:
        layers: `layers[h].weight` is W~_h.
        lora_A, lora_B: `lora_A[h].weight` (r x in), `lora_B[h].weight` (out x r).
    """

    weight: Tensor
    layers: nn.ModuleList
    lora_A: nn.ModuleList  # noqa: N815  # A and B are what the field calls them
    lora_B: nn.ModuleList  # noqa: N815

    def set_copies(self, copies: HeadCopies) -> None:
        """Sets the heads' copies and factors."""
        self.reset, self.draws = copies.reset, copies.draws
        self.layers, self.lora_A, self.lora_B = copies.layers, copies.lora_A, copies.lora_B
        for head, copy in enumerate(self.layers):
            biases = self._parameters.get("bias") if self.bias_replicas is None else self.bias_replicas
            copy.__dict__["biases"] = (biases, None if self.bias_replicas is None else head)
        self._move_to_head_devices()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.kind.main(self, x, self.main_weight, self._parameters.get("bias"))
        head = ACTIVE_HEAD.get()
        if head is not None:
            return self._forward_head(x, head).to(self.main_weight.device)
        check_input(self, x)
        parts = [self._forward_head(part, head) for head, part in enumerate(x.chunk(self.num_heads))]
        return torch.cat([part.to(x.device) for part in parts])

    def _forward_head(self, x: Tensor, head: int) -> Tensor:
        """One head's output for its part of the input, on the head's device."""
        kind, bias, weight = self.kind, self.head_bias(head), self._head_weight(head)
        (a, b), s = self._head_factors(head), self.specs[head].scaling
        x, bias = x.to(weight.device), None if bias is None else bias.to(weight.device)
        if kind.product is None:
            with self.head_statistics(head):
                return kind.main(self, x, weight + (b.weight @ a.weight)[:, 0] * s, bias)
        return kind.main(self, x, weight, bias) + kind.product(self, x, a.weight, b.weight, s)

    def effective_weight(self, head: int) -> Tensor:
        a, b = self._head_factors(head)
        change = as_stored(self.specs[head], b.weight @ a.weight) * self.specs[head].scaling
        return (self._head_weight(head) + change).to(self.main_weight.device)

    @torch.no_grad()
    def merge_weight(self) -> None:
        terms: list[tuple[float, Tensor, Tensor]] = []
        for head, spec in enumerate(self.specs):
            (a, b), c = self._head_factors(head), spec.scaling / self.num_heads
            terms.append((c, b.weight, a.weight))
            if self.reset != "B":
                terms.append((-c, b.reference, a.reference))
        if not self._is_merged():
            add_to_weight(self.specs[0], self.main_weight, [(c, b.detach(), a.detach()) for c, b, a in terms])
        for head in range(self.num_heads):
            a, b = self._head_factors(head)
            if self.reset == "B":
                b.weight.zero_()
            else:
                a.reference.copy_(a.weight)
                b.reference.copy_(b.weight)
        self._update_copies()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        seed, draws = self.draws.advance()
        for head, spec in enumerate(self.specs):
            a, b = self._head_factors(head)
            a.weight.copy_(draw_head_a(spec, seed, head, draws))
            for tensor in (b.weight, a.reference, b.reference):
                tensor.zero_()
        self._update_copies()
        super().reset_lora_parameters()

    def _is_merged(self) -> bool:
        """Whether W holds the factors already, e.g. because a layer that shares W has just merged them."""
        factors = [f for part in (self.lora_A, self.lora_B) for f in part if isinstance(f, HeadFactor)]
        return self.reset != "B" and are_equal(*((f.weight, f.reference) for f in factors))

    @torch.no_grad()
    def _update_copies(self) -> None:
        """W~_h := W - s B'_h A'_h."""
        main = self.main_weight.detach()
        dtype = torch.promote_types(main.dtype, torch.float32)
        for head, spec in enumerate(self.specs):
            copy, (a, b) = self._head_weight(head), self._head_factors(head)
            base = main.to(copy.device, dtype).contiguous()
            with without_autocast(copy.device):
                fold_reference(spec, copy, base, b.reference.to(dtype), a.reference.to(dtype))

    def _head_weight(self, head: int) -> Tensor:
        copy = self.layers[head]
        assert isinstance(copy, HeadWeight)
        return copy.weight

    def _head_factors(self, head: int) -> tuple[HeadFactor, HeadFactor]:
        a, b = self.lora_A[head], self.lora_B[head]
        assert isinstance(a, HeadFactor)
        assert isinstance(b, HeadFactor)
        return a, b

    def _move_to_head_devices(self) -> None:
        """Moves each head's copy, factors, and statistics to the head's device."""
        for head in range(self.num_heads):
            device = head_device(head, self.main_weight.device)
            for part in (self.layers[head], self.lora_A[head], self.lora_B[head]):
                if next(part.parameters()).device != device:
                    part.to(device)
            for name in STATISTICS:
                statistic = self._buffers.get(f"{name}_head{head}")
                if statistic is not None:
                    self._buffers[f"{name}_head{head}"] = statistic.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .cuda() puts everything on one device
        self._move_to_head_devices()
        return self
