"""What a head measures of its training for the rows of merges: rates, gradients, tokens, memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lte_ray.messages import Measures
from lte_ray.worker import Batch, Worker, count_tokens, flops_per_sample

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Highest operations per second of GPUs by a part of their names, the first that fits: dense products in bfloat16 (V100 and T4:
float16), of NVIDIA's data sheets. Where these give the number with sparsity, it is half of that."""


class Meter:
    """Measures of one head since its last contribution.

    Args:
        worker: says how many tokens and operations a sample takes, if it does.
        device: where the head trains.

    Attributes:
        peaks: as in `Measures`; where several processes train the head together, those of all.
    """

    def __init__(self, worker: Worker, device: torch.device) -> None:
        self._worker, self._device = worker, device
        self._tokens: int | None = 0
        self._samples = 0
        self.peaks = gpu_peak(device)

    def count(self, batch: Batch, samples: int) -> None:
        """Counts a batch that the head takes."""
        tokens = count_tokens(self._worker, batch)
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens
        self._samples += samples

    def close(self, optimizer: torch.optim.Optimizer, gradient_norm: Tensor | None, samples: int) -> Measures:
        """Returns the measures, and begins again.

        Args:
            optimizer: with the learning rates as they are now.
            gradient_norm: of the last gradient that was measured.
            samples: that the contribution holds; more than were counted here, if an earlier one wasn't merged.
        """
        tokens, taken = self._tokens, self._samples
        self._tokens, self._samples = 0, 0
        flops = flops_per_sample(self._worker)
        on_gpu = self._device.type == "cuda"
        return Measures(
            lr=learning_rates(optimizer),
            gradient_norm=None if gradient_norm is None else float(gradient_norm),
            tokens=round(tokens / taken * samples) if tokens and taken else None,
            flops=None if flops is None else flops * samples,
            peaks=self.peaks,
            gpu_memory=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            memory=_peak_resident_bytes(),
        )


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The highest rate of the parameter groups of each name; a group without a name counts by its number."""
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", number))
        rates[name] = max(float(group["lr"]), rates.get(name, 0.0))
    return rates


@torch.no_grad()
def total_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """The norm of all gradients together; None if there is none."""
    gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else None


def gpu_peak(device: torch.device) -> dict[str, float]:
    """By the id of the device's GPU, its highest operations per second; empty on CPUs, and for GPUs that aren't known."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in properties.name), None)
    return {} if peak is None else {str(getattr(properties, "uuid", device)): peak}


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
