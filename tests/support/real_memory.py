"""The memory of a real head on the CPU: what it keeps, and the peak of a step as torch's allocator sees it."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.profiler import ProfilerActivity, profile

from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.messages import ContributionResult


def measure_real_head(worker: Any, settings: Settings) -> tuple[int, int]:
    """Trains a head in this process for two rounds of a step each.

    Returns:
        The bytes that it keeps with its gradients, after a merge; and the most that the second step allocates at once.
    """
    initial = prepare(worker, settings)
    settings, bases = initial.complete(settings), [initial.base, initial.base.clone()]
    before = _storages()
    head = Head(worker, settings, 0)
    head.start(0, bases[0])
    head.train(1)
    sent = head.contribute()
    result = ContributionResult(head=0, sequence=sent.sequence, accepted=True, version=1)
    head.adopt(result, 1, bases[1])
    del sent
    kept = []
    head.average_gradients = lambda: kept.append(_bytes_of(head, before))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        head.train(1)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return kept[0], peak


def _bytes_of(head: Head, before: set[int]) -> int:
    """Bytes of all tensors in this process that aren't in `before`, and of the head's gradients."""
    gc.collect()
    tensors = _tensors()
    tensors += [p.grad for p in head.trained_parameters.values() if p.grad is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for key, size in storages.items() if key not in before)


def _storages() -> set[int]:
    gc.collect()
    return {each.untyped_storage()._cdata for each in _tensors()}


def _tensors() -> list[Tensor]:
    """All tensors of this process that have memory of their own: other tests may have left lazy and sparse ones."""
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    return [each for each in tensors if not is_lazy(each) and each.device.type == "cpu" and each.layout is torch.strided]
