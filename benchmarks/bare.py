"""Bare processes that run heads without Ray and never merge: the baseline of other benchmarks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import keep_freed_memory
from lte_ray.engine.settings import Settings

NICENESS = 15
"""The niceness of Ray's workers."""


def steps_per_second(worker: Any, steps: Sequence[int]) -> float:
    """The sum of the rates of processes with one head each, which start together.

    A rate is taken from the end of the first step to the end of the last. Like heads in actors, the processes keep freed
    memory and run at the niceness of Ray's workers, each with one thread.

    Args:
        steps: by head, the steps that it takes.
    """
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(len(steps)), context.Queue()
    processes = [
        context.Process(target=_train, args=(worker, number, len(steps), count, start, rates))
        for number, count in enumerate(steps)
    ]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return total


def _train(worker: Any, number: int, heads: int, steps: int, start: Barrier, rates: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.nice(NICENESS)
    settings = Settings("bare", LTEConfig(num_heads=heads), MergeConfig(merge_iter=steps), TrainConfig(steps=steps))
    head = Head(worker, settings, number)
    head.start(0, prepare(worker, settings).base)
    start.wait()
    head.train_round()
    status = head.status()
    assert status.last_step_at is not None
    assert status.first_step_at is not None
    rates.put((steps - 1) / (status.last_step_at - status.first_step_at))
