"""This process among those that torchrun started: ranks, devices, reductions. Independent of Ray."""

from __future__ import annotations

import os
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from lte_ray.config import suggest
from lte_ray.errors import ConfigError

REDUCTIONS = ("mean", "sum")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def num_visible_devices() -> int:
    """The number of devices this process can compute on: its visible CUDA devices, or 1 (the CPU) if it has none."""
    return max(1, torch.cuda.device_count())


def is_distributed() -> bool:
    """Whether torch.distributed has a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """This process's rank on its machine, as torchrun sets it (LOCAL_RANK); without torchrun its `rank`.

    Raises:
        ConfigError: LOCAL_RANK isn't a number.
    """
    return _read_number("LOCAL_RANK", str(rank()))


def device() -> torch.device:
    """This process's device: the CUDA device whose index is its local rank, or the CPU.

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
    """Whether this is the process that prints and saves: rank 0, or the only process."""
    return rank() == 0


@overload
def reduce(tensor: Tensor, reduction: str = "mean") -> Tensor: ...
@overload
def reduce(tensor: float, reduction: str = "mean") -> Tensor | float: ...
def reduce(tensor: Tensor | float, reduction: str = "mean") -> Tensor | float:
    """The sum or mean of `tensor` over all processes, on each of them: a new tensor of the same shape, without gradient.

    The mean of integers is floating-point; otherwise the type stays. With NCCL, a CPU tensor is sent through this process's
    GPU. A number becomes a tensor, but without a process group it is returned unchanged.

    Raises:
        ConfigError: `reduction` is neither "mean" nor "sum".
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"reduction = {reduction!r} is unknown; known: {', '.join(REDUCTIONS)}.{suggest(str(reduction), REDUCTIONS)}"
        )
    if not isinstance(tensor, Tensor):
        if not is_distributed():
            return tensor
        tensor = torch.tensor(tensor)
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
            total = total.to(device())
        dist.all_reduce(total, op=dist.ReduceOp.SUM)  # not AVG: gloo lacks it
        total = total.to(tensor.device)
    return total / world_size() if reduction == "mean" else total


def init_distributed_mode(args: Any = None) -> bool:
    """Joins the process group that torchrun describes in the environment: NCCL with CUDA, gloo on CPUs.

    Without torchrun it does nothing. An existing process group is kept.

    Args:
        args: an object, e.g. argparse's Namespace, whose attributes are set: `distributed`, and with a process group `rank`,
            `world_size`, `gpu` (the local rank), and `dist_backend`. Its `dist_url`, if it has one, is the rendezvous URL.

    Returns:
        Whether a process group exists now.

    Raises:
        ConfigError: the environment has some of RANK, WORLD_SIZE, and LOCAL_RANK but not all; one isn't a number; or the
            machine runs more processes than it has visible CUDA devices.
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
        raise ConfigError(f"{', '.join(missing)} isn't set, but others of {', '.join(TORCHRUN)} are; start with torchrun.")
    own_device = device()
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    backend = "nccl" if own_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=url, rank=_read_number("RANK"), world_size=_read_number("WORLD_SIZE"))
    return True


def _read_number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r} in the environment isn't a number; torchrun sets it.")
    return int(text)
