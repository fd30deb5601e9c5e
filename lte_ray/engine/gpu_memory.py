"""The part of a GPU's memory that a process may use, where several share one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lte_ray.errors import WorkerFailed


def limit_gpu_memory(share: float, device: torch.device) -> None:
    """Limits this process to a share of the GPU's memory: torch then refuses what would take it from the others.

    The limit is for tensors. What CUDA itself needs in each process, some hundred MB, comes in addition.

    Args:
        share: between 0 and 1; 1: no limit.
        device: of this process. There is nothing to limit on a CPU.
    """
    if share < 1 and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


@contextmanager
def explaining_limit(share: float, who: str) -> Iterator[None]:
    """If the worker's code in the block needs more memory than the GPU's share, the error says what to change.

    Args:
        share: as of `limit_gpu_memory`.
        who: the process, for people.

    Raises:
        WorkerFailed: as raised in the block.
    """
    try:
        yield
    except WorkerFailed as error:
        if share == 1 or not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        words = (
            f"{who} may use {100 * share:g}% of its GPU's memory, since it shares the GPU (--gpu-memory-share). Lower what it "
            "needs (smaller batches with --accumulate, --precision bf16-mixed, --checkpoint-activations), let fewer processes "
            "share a GPU (--gpus-per-head), or raise --gpu-memory-share; 1 switches the limit off."
        )
        raise WorkerFailed(error.where, error.step, f"{error.traceback.rstrip()}\n\n{words}") from error.__cause__
