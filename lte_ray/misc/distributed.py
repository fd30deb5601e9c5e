"""Facts on this process among those that torchrun started, and sums over them. Nothing here knows Ray."""

from __future__ import annotations

import os
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from lte_ray.config import near
from lte_ray.errors import ConfigError

REDUCTIONS = ("mean", "sum")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def num_visible_devices() -> int:
    """Devices that this process can compute on: its visible CUDA devices, or 1 (the CPU) where there is none."""
    return max(1, torch.cuda.device_count())


def is_distributed() -> bool:
    """Whether a process group of torch.distributed is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """This process's number on its own machine, as torchrun sets it (LOCAL_RANK); without torchrun its `rank`.

    Raises:
        ConfigError: LOCAL_RANK is no number.
    """
    return _number("LOCAL_RANK", str(rank()))


def device() -> torch.device:
    """The device of this process: the CUDA device numbered by its local rank, or the CPU.

    Raises:
        ConfigError: the machine runs more processes than it has visible CUDA devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = local_rank()
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK = {index}, but only {torch.cuda.device_count()} CUDA devices are visible; start fewer processes "
            "(torchrun --nproc-per-node) or make more devices visible (CUDA_VISIBLE_DEVICES)."
        )
    return torch.device("cuda", index)


def is_main_process() -> bool:
    """Whether this is the process that prints and saves: rank 0, or the only one."""
    return rank() == 0


@overload
def reduce(tensor: Tensor, reduction: str = "mean") -> Tensor: ...
@overload
def reduce(tensor: float, reduction: str = "mean") -> Tensor | float: ...
def reduce(tensor: Tensor | float, reduction: str = "mean") -> Tensor | float:
    """The sum or mean of `tensor` over all processes, in each of them; a new tensor of its shape, without gradient.

    A mean of integers is floating-point, else the type stays. With NCCL a CPU tensor travels over this process's GPU. A
    number becomes a tensor; without a process group it is returned as it is.

    Raises:
        ConfigError: another reduction than "mean" or "sum".
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"reduction = {reduction!r} is unknown; known: {', '.join(REDUCTIONS)}.{near(str(reduction), REDUCTIONS)}"
        )
    if not isinstance(tensor, Tensor):
        if not is_distributed():
            return tensor
        tensor = torch.tensor(tensor)
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
            total = total.to(device())
        dist.all_reduce(total, op=dist.ReduceOp.SUM)  # not AVG: gloo has none
        total = total.to(tensor.device)
    return total / world_size() if reduction == "mean" else total


def init_distributed_mode(args: Any = None) -> bool:
    """Joins the process group that torchrun describes in the environment; NCCL with CUDA, gloo on CPU.

    Without torchrun nothing happens. Where a group is up already, it is kept.

    Args:
        args: an object (say, of argparse) that is told of it: `distributed`, and with a group `rank`, `world_size`, `gpu` (the
            local rank) and `dist_backend`. Its `dist_url`, if it has one, says where processes meet.

    Returns:
        Whether there is a process group now.

    Raises:
        ConfigError: the environment holds only part of RANK, WORLD_SIZE and LOCAL_RANK, or no numbers; or there are
            more processes than CUDA devices.
    """
    joined = is_distributed() or _join(getattr(args, "dist_url", None))
    if args is not None:
        args.distributed = joined
        if joined:
            args.rank, args.world_size, args.gpu, args.dist_backend = rank(), world_size(), local_rank(), dist.get_backend()
    return joined


def _join(url: str | None) -> bool:
    missing = [name for name in TORCHRUN if name not in os.environ]
    if len(missing) == len(TORCHRUN):
        return False
    if missing:
        raise ConfigError(f"{', '.join(missing)} isn't set, but others of {', '.join(TORCHRUN)} are; start this with torchrun.")
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=url, rank=_number("RANK"), world_size=_number("WORLD_SIZE"))
    return True


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r} in the environment is no number; torchrun sets it.")
    return int(text)
