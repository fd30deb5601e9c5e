"""The factors of all heads for one main weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lte_ray.adapters.factors import draw_a
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_matrix, as_stored
from lte_ray.merging.low_rank import add_products


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_the_wire(tensor: Tensor) -> Tensor:
    """The tensor where the backend of `torch.distributed` takes it."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would compute in a type of 16 bits."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Draws(nn.Module):
    """What A is drawn from: the seed, and how often it was drawn.

    They are buffers, so that a run that goes on from a checkpoint draws what an uninterrupted one does. Layers that share
    factors share them.
    """

    seed: Tensor
    count: Tensor

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed is {seed}, but it must fit into 64 bits: -2**63 <= seed < 2**63.")
        self.register_buffer("seed", torch.tensor(seed, device=device))
        self.register_buffer("count", torch.tensor(1, device=device))

    def again(self) -> tuple[int, int]:
        """(seed, draws so far) for another draw: rank 0's where there are several processes."""
        numbers = torch.stack([self.seed, self.count])
        if processes() > 1:
            numbers = on_the_wire(numbers)
            dist.broadcast(numbers, 0)
        seed, count = numbers.tolist()
        self.seed.fill_(seed)
        self.count.fill_(count + 1)
        return seed, count

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, own in self._buffers.items():  # a checkpoint from elsewhere needn't have them
            state_dict.setdefault(prefix + name, own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class StackedFactors(nn.Module):
    """A (H x r x in) and B (H x out x r) of H heads, and the reference A', B' that the main weight holds of each.

    Ranks may differ by head: the rest up to the largest is zero in A and in B, gets no gradient and stays so. A is drawn from
    (seed, head, name) as the Ray heads' is, B starts at zero. Layers that share a weight share its stack.

    Args:
        specs: each head's entry in its plan.
        like: a tensor of the wanted type and device.
        seed: of the draw.
        reset: "B" where a merge sets B to zero: the reference stays zero then and isn't computed.
    """

    scales: Tensor
    prev_lora_A_weight: Tensor  # noqa: N815  # A and B are what the field calls them
    prev_lora_B_weight: Tensor  # noqa: N815

    def __init__(self, specs: Sequence[Adapted], like: Tensor, seed: int, reset: str) -> None:
        super().__init__()
        self.specs, self.reset, self.draws = tuple(specs), reset, Draws(seed, like.device)
        heads, rank, (out_features, in_features) = len(specs), max(s.rank for s in specs), specs[0].matrix
        self.lora_A_weight = nn.Parameter(like.new_zeros(heads, rank, in_features))
        self.lora_B_weight = nn.Parameter(like.new_zeros(heads, out_features, rank))
        self.register_buffer("prev_lora_A_weight", torch.zeros_like(self.lora_A_weight))
        self.register_buffer("prev_lora_B_weight", torch.zeros_like(self.lora_B_weight))
        self.register_buffer("scales", self._scales(), persistent=False)
        self._draw(seed, 0)

    def _scales(self) -> Tensor:
        """Each head's s, in the factors' type, or float32 where that has fewer bits."""
        dtype = torch.promote_types(self.lora_A_weight.dtype, torch.float32)
        return torch.tensor([s.scaling for s in self.specs], dtype=dtype, device=self.lora_A_weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self._scales()  # not what is left of another type's
        return self

    @property
    def scaling(self) -> float | tuple[float, ...]:
        """s, or each head's where they differ."""
        scalings = tuple(s.scaling for s in self.specs)
        return scalings[0] if len(set(scalings)) == 1 else scalings

    def draw(self) -> None:
        """Draws another A; B and the reference become zero."""
        self._draw(*self.draws.again())

    @torch.no_grad()
    def _draw(self, seed: int, draws: int) -> None:
        for tensor in (self.lora_A_weight, self.lora_B_weight, self.prev_lora_A_weight, self.prev_lora_B_weight):
            tensor.zero_()
        for head, spec in enumerate(self.specs):
            self.lora_A_weight[head, : spec.rank].copy_(drawn(spec, seed, head, draws))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of all heads, along the rank: one product is B A - B' A'."""
        a, b = self.lora_A_weight, self.lora_B_weight
        if self.reset == "B":
            return a, b
        return torch.cat([a, self.prev_lora_A_weight], 1), torch.cat([b, -self.prev_lora_B_weight], 2)

    def pair(self, head: int) -> tuple[Tensor, Tensor]:
        """([A; A'], [B, -B']) of one head."""
        rank = self.specs[head].rank
        a, b = self.lora_A_weight[head, :rank], self.lora_B_weight[head, :, :rank]
        if self.reset == "B":
            return a, b
        return (
            torch.cat([a, self.prev_lora_A_weight[head, :rank]]),
            torch.cat([b, -self.prev_lora_B_weight[head, :, :rank]], 1),
        )

    def vector(self, head: int) -> Tensor:
        """s (B A - B' A') of one head, of a weight that is a vector."""
        a, b = self.pair(head)
        return (b @ a)[:, 0] * self.specs[head].scaling

    def vectors(self) -> Tensor:
        """s (B A - B' A') of all heads (H x d), of a weight that is a vector."""
        a, b = self.pairs()
        return self.scaled((b @ a)[:, :, 0])

    def scaled(self, tensor: Tensor) -> Tensor:
        """A tensor (H x ...) times each head's s."""
        scales = self.scales.view(-1, *[1] * (tensor.dim() - 1))
        return tensor * self.scaling if isinstance(self.scaling, float) else (tensor * scales).to(tensor.dtype)

    def average(self) -> tuple[Tensor, Tensor]:
        """(A (H r x in), B (out x H r)), whose product is (1/H) sum_h s_h B_h A_h."""
        b = self.scaled(self.lora_B_weight) / len(self.specs)
        return self.lora_A_weight.flatten(0, 1), b.movedim(0, 1).flatten(1)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """weight += (1/H) sum_h s_h (B_h A_h - B'_h A'_h); the reference becomes the factors, or B zero (`reset`).

        A second call right after adds nothing, so layers that share the weight may each call it.
        """
        if self.reset != "B" and same(
            (self.lora_A_weight, self.prev_lora_A_weight), (self.lora_B_weight, self.prev_lora_B_weight)
        ):
            return
        count, terms = len(self.specs), []
        for head, spec in enumerate(self.specs):
            c = spec.scaling / count
            terms.append((c, self.lora_B_weight[head], self.lora_A_weight[head]))
            if self.reset != "B":
                terms.append((-c, self.prev_lora_B_weight[head], self.prev_lora_A_weight[head]))
        merge_terms(self.specs[0], weight, terms)
        if self.reset == "B":
            self.lora_B_weight.zero_()
        else:
            self.prev_lora_A_weight.copy_(self.lora_A_weight)
            self.prev_lora_B_weight.copy_(self.lora_B_weight)


def drawn(spec: Adapted, seed: int, head: int, draws: int) -> Tensor:
    """The A that a head draws for the first time (draws = 0) or again."""
    return draw_a((spec.rank, spec.matrix[1]), seed, head, f"{spec.name}@{draws}" if draws else spec.name)


def same(*pairs: tuple[Tensor, Tensor]) -> bool:
    """Whether the two tensors of every pair are equal."""
    return not any(a.is_meta or b.is_meta or not torch.equal(a, b) for a, b in pairs)


def merge_terms(spec: Adapted, weight: Tensor, terms: Sequence[tuple[float, Tensor, Tensor]]) -> None:
    """weight += sum_k c_k B_k A_k for a stored weight, computed in float32 at least and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype).contiguous()
    with exactly(weight.device):
        add_products(as_matrix(spec, exact), [(c, b.to(exact), a.to(exact)) for c, b, a in terms])
    if exact.data_ptr() != weight.data_ptr():
        weight.copy_(exact)


def averaged(spec: Adapted, weight: Tensor, stack: StackedFactors) -> Tensor:
    """weight + (1/H) sum_h s_h B_h A_h as a new tensor."""
    result = weight.detach().clone(memory_format=torch.contiguous_format)
    with exactly(weight.device):
        a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in stack.average())
        change = as_stored(spec, b @ a)
    return (result.to(change.dtype) + change).to(weight.dtype)
