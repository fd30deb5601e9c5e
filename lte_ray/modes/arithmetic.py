"""Arithmetic that all modes share: draws of A, products added to a stored weight, averages over heads and processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lte_ray.adapters.factors import draw_initial_a
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_matrix
from lte_ray.merging.low_rank import add_products
from lte_ray.misc.distributed import world_size


class DrawState(nn.Module):
    """What the next draw of A depends on: the seed, and the number of draws so far.

    Both are buffers, so that a run resumed from a checkpoint draws what an uninterrupted run draws. Layers that share
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

    def advance(self) -> tuple[int, int]:
        """Counts another draw; returns (seed, draws before it). With several processes, rank 0's values are used."""
        numbers = torch.stack([self.seed, self.count])
        if world_size() > 1:
            numbers = to_backend_device(numbers)
            dist.broadcast(numbers, 0)
        seed, count = numbers.tolist()
        self.seed.fill_(seed)
        self.count.fill_(count + 1)
        return seed, count

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():  # checkpoints of the authors' library lack them
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def draw_head_a(spec: Adapted, seed: int, head: int, draws: int) -> Tensor:
    """Draws a head's A (r x in) from (seed, head, name), as Ray heads do; `draws` is the number of draws before."""
    return draw_initial_a((spec.rank, spec.matrix[1]), seed, head, f"{spec.name}@{draws}" if draws else spec.name)


def are_equal(*pairs: tuple[Tensor, Tensor]) -> bool:
    """Whether the two tensors of every pair are equal. Tensors on the meta device never are."""
    return not any(a.is_meta or b.is_meta or not torch.equal(a, b) for a, b in pairs)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turns autocast off, which would compute in a 16-bit type."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def add_to_weight(spec: Adapted, weight: Tensor, terms: Sequence[tuple[float, Tensor, Tensor]]) -> None:
    """weight += sum_k c_k B_k A_k for terms (c, B, A) and a stored weight, computed in float32 or wider and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype).contiguous()
    with without_autocast(weight.device):
        add_products(as_matrix(spec, exact), [(c, b.to(exact), a.to(exact)) for c, b, a in terms])
    if exact.data_ptr() != weight.data_ptr():
        weight.copy_(exact)


@torch.no_grad()
def set_to_mean(targets: Sequence[Tensor], sources: Sequence[Tensor], across_processes: bool = False) -> None:
    """Sets all `targets` to the mean of `sources`, computed in float32 or wider; integers become the first source.

    Args:
        across_processes: take the mean over all processes of `torch.distributed` too. Gradients, and thus parameters, are
            equal in all processes; running statistics are not, because each process sees its own data.
    """
    if not sources[0].is_floating_point():
        mean = sources[0].clone()
    else:
        dtype = torch.promote_types(sources[0].dtype, torch.float32)
        mean = torch.stack([t.detach().to(targets[0].device, dtype) for t in sources]).mean(0)
        if across_processes and world_size() > 1:
            total = to_backend_device(mean)
            dist.all_reduce(total)
            mean = total / world_size()
    for target in targets:
        target.copy_(mean)


def to_backend_device(tensor: Tensor) -> Tensor:
    """The tensor on a device that the backend of `torch.distributed` can send from."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
