"""Shares of a GPU's memory, with a fake in place of torch's part for CUDA."""

from __future__ import annotations

import pytest
import torch

from lte_ray.engine.gpu_memory import explaining_limit, limit_gpu_memory
from lte_ray.errors import HeadLost, WorkerFailed, worker_errors


def test_only_shared_gpus_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has a GPU for itself, or none, may use all memory."""
    calls: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: calls.append(given))
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    for share, device in ((1.0, gpu), (0.25, cpu), (1.0, cpu), (0.25, gpu)):
        limit_gpu_memory(share, device)
    assert calls == [(0.25, gpu)]


def exceed(share: float, error: Exception) -> None:
    """The worker's code raises while the GPU's memory is limited to a share."""
    with explaining_limit(share, "Head 3"), worker_errors("head 3", 7):
        raise error


def test_too_little_memory_is_explained() -> None:
    """The error keeps the worker's traceback, and says what limits the memory and what to change."""
    with pytest.raises(WorkerFailed) as raised:
        exceed(0.25, torch.OutOfMemoryError("CUDA out of memory."))
    text = str(raised.value)
    assert "head 3 at local step 7" in text and "OutOfMemoryError: CUDA out of memory." in text
    assert "Head 3 may use 25% of its GPU's memory, since it shares the GPU (--gpu-memory-share)" in text


@pytest.mark.parametrize(
    ("share", "error"), [(1.0, torch.OutOfMemoryError("none left")), (0.25, ValueError("mine")), (0.25, HeadLost("gone"))]
)
def test_other_errors_stay_as_they_are(share: float, error: Exception) -> None:
    """Without a limit there is nothing to explain."""
    with pytest.raises(WorkerFailed) as raised:
        exceed(share, error)
    assert "--gpu-memory-share" not in str(raised.value)
