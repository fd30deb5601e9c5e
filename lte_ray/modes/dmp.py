"""Mode "dmp": a copy of the main weight for each head, on all visible devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_stored
from lte_ray.merging.low_rank import fold_reference
from lte_ray.modes.base import STATISTICS
from lte_ray.modes.batch_split import HEAD
from lte_ray.modes.ddp import check_input
from lte_ray.modes.stacked_factors import Draws, drawn, exactly, merge_terms, same
from lte_ray.modes.state_dict_compat import DMPNames


def device_of(head: int, home: torch.device) -> torch.device:
    """Where a head's copies live: round robin over the visible CUDA devices, or at `home` unless that is one."""
    return torch.device("cuda", head % torch.cuda.device_count()) if home.type == "cuda" else home


class Copy(nn.Module):
    """One head's W~ = W - s B' A', in the stored shape; it gets no gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """The head's bias, to look at."""
        biases: Tensor | None
        biases, head = self.__dict__["biases"]
        return biases if biases is None or head is None else biases[head]


class Factor(nn.Module):
    """One head's A (r x in) or B (out x r) as `weight`, and what of it the main weight holds, the reference."""

    reference: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("reference", torch.zeros_like(weight))


class Copies:
    """The copies and factors of one main weight; layers that share the weight share them.

    Args:
        specs: each head's entry in its plan.
        weight: the main weight.
        seed: of the draw of A, as the Ray heads'.
        reset: "B" where a merge sets B to zero.
    """

    def __init__(self, specs: Sequence[Adapted], weight: Tensor, seed: int, reset: str) -> None:
        self.specs, self.reset, self.draws = tuple(specs), reset, Draws(seed, weight.device)
        devices = [device_of(head, weight.device) for head in range(len(specs))]
        like = [weight.detach().to(device) for device in devices]
        self.layers = nn.ModuleList(Copy(w) for w in like)
        self.lora_A = nn.ModuleList(
            Factor(drawn(s, seed, head, 0).to(w)) for head, (w, s) in enumerate(zip(like, specs, strict=True))
        )
        self.lora_B = nn.ModuleList(Factor(w.new_zeros(s.matrix[0], s.rank)) for w, s in zip(like, specs, strict=True))


class DMPLayer(DMPNames):
    """y_h = f(x_h; W~_h, b_h) + s (B_h A_h)(x_h), where W~_h = W - s B'_h A'_h is the head's own copy.

    Each head computes what a Ray head computes, on the device that its copy lies on: several CUDA devices work at once. In
    evaluation y = f(x; W, b). A merge adds products of factors to W; no dense change of a head is ever made.

    Attributes:
        layers: `layers[h].weight` is W~_h.
        lora_A, lora_B: `lora_A[h].weight` (r x in), `lora_B[h].weight` (out x r).
    """

    weight: Tensor
    layers: nn.ModuleList
    lora_A: nn.ModuleList  # noqa: N815  # A and B are what the field calls them
    lora_B: nn.ModuleList  # noqa: N815

    def take_copies(self, copies: Copies) -> None:
        """Takes over the copies and factors."""
        self.reset, self.draws = copies.reset, copies.draws
        self.layers, self.lora_A, self.lora_B = copies.layers, copies.lora_A, copies.lora_B
        for head, copy in enumerate(self.layers):
            biases = self._parameters.get("bias") if self.bias_replicas is None else self.bias_replicas
            copy.__dict__["biases"] = (biases, None if self.bias_replicas is None else head)
        self._spread()

    def _spread(self) -> None:
        """Moves each head's copies, factors and statistics to its device."""
        for head in range(self.num_heads):
            device = device_of(head, self.main_weight.device)
            for part in (self.layers[head], self.lora_A[head], self.lora_B[head]):
                if next(part.parameters()).device != device:
                    part.to(device)
            for name in STATISTICS:
                statistic = self._buffers.get(f"{name}_head{head}")
                if statistic is not None:
                    self._buffers[f"{name}_head{head}"] = statistic.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .cuda() puts everything on one device
        self._spread()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.kind.main(self, x, self.main_weight, self._parameters.get("bias"))
        head = HEAD.get()
        if head is not None:
            return self._one(x, head).to(self.main_weight.device)
        check_input(self, x)
        parts = [self._one(part, head) for head, part in enumerate(x.chunk(self.num_heads))]
        return torch.cat([part.to(x.device) for part in parts])

    def _one(self, x: Tensor, head: int) -> Tensor:
        """One head's output on its input, on its device."""
        kind, bias, weight = self.kind, self.bias_of(head), self._weight(head)
        a, b, s = self._factor(self.lora_A, head).weight, self._factor(self.lora_B, head).weight, self.specs[head].scaling
        x, bias = x.to(weight.device), None if bias is None else bias.to(weight.device)
        if kind.product is None:
            with self.statistics_of(head):
                return kind.main(self, x, weight + (b @ a)[:, 0] * s, bias)
        return kind.main(self, x, weight, bias) + kind.product(self, x, a, b, s)

    def effective_weight(self, head: int) -> Tensor:
        a, b = self._factor(self.lora_A, head).weight, self._factor(self.lora_B, head).weight
        weight = self._weight(head) + as_stored(self.specs[head], b @ a) * self.specs[head].scaling
        return weight.to(self.main_weight.device)

    def _weight(self, head: int) -> Tensor:
        copy = self.layers[head]
        assert isinstance(copy, Copy)
        return copy.weight

    def _factor(self, factors: nn.ModuleList, head: int) -> Factor:
        factor = factors[head]
        assert isinstance(factor, Factor)
        return factor

    @torch.no_grad()
    def merge_weight(self) -> None:
        terms: list[tuple[float, Tensor, Tensor]] = []
        for head, spec in enumerate(self.specs):
            a, b, c = self._factor(self.lora_A, head), self._factor(self.lora_B, head), spec.scaling / self.num_heads
            terms.append((c, b.weight, a.weight))
            if self.reset != "B":
                terms.append((-c, b.reference, a.reference))
        if not self._is_merged():
            merge_terms(self.specs[0], self.main_weight, [(c, b.detach(), a.detach()) for c, b, a in terms])
        for head in range(self.num_heads):
            a, b = self._factor(self.lora_A, head), self._factor(self.lora_B, head)
            if self.reset == "B":
                b.weight.zero_()
            else:
                a.reference.copy_(a.weight)
                b.reference.copy_(b.weight)
        self._fold()

    def _is_merged(self) -> bool:
        """Whether the main weight holds the factors already, as where a layer that shares it has just merged them."""
        factors = [f for part in (self.lora_A, self.lora_B) for f in part if isinstance(f, Factor)]
        return self.reset != "B" and same(*((f.weight, f.reference) for f in factors))

    @torch.no_grad()
    def _fold(self) -> None:
        """W~_h := W - s B'_h A'_h."""
        main = self.main_weight.detach()
        dtype = torch.promote_types(main.dtype, torch.float32)
        for head, spec in enumerate(self.specs):
            copy, a, b = self._weight(head), self._factor(self.lora_A, head), self._factor(self.lora_B, head)
            base = main.to(copy.device, dtype).contiguous()
            with exactly(copy.device):
                fold_reference(spec, copy, base, b.reference.to(dtype), a.reference.to(dtype))

    @torch.no_grad()
    def _draw(self) -> None:
        seed, draws = self.draws.again()
        for head, spec in enumerate(self.specs):
            a, b = self._factor(self.lora_A, head), self._factor(self.lora_B, head)
            a.weight.copy_(drawn(spec, seed, head, draws))
            for tensor in (b.weight, a.reference, b.reference):
                tensor.zero_()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        self._draw()
        self._fold()
        super().reset_lora_parameters()
