"""The worker: the user's program that every head runs."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lte_ray.data.shard import Shard
from lte_ray.errors import WorkerError

Batch = Any
"""Whatever the worker's `train_batches` yields: a tensor, or tuples, lists and dicts of them."""


class Worker(Protocol):
    """What to train: a model, its data, its loss, and how to judge it. See `workers/` for examples to copy.

    A worker is made once, in the driver, and is pickled to every process, so its constructor keeps settings only;
    heavy things (data, model) are made in the methods.
    """

    def build_model(self) -> nn.Module:
        """The unconverted model, on the CPU. Called under a fixed seed, once in each process."""
        ...

    def train_batches(self, shard: Shard) -> Iterator[Batch]:
        """This head's batches, from `shard.cursor` on. If it ends, it's called again with the cursor moved on."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the batch, a scalar. Tensors in the batch are on the model's device already."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judges the merged weights, in an unconverted model in eval mode, without gradients."""
        ...

    # Optional:
    #   build_optimizer(params) -> Optimizer       params: parameter groups, named "lora" and "replica"
    #   build_schedule(optimizer, total_steps)     -> a torch learning-rate scheduler, stepped after every local step
    #   sample(model) -> str                       shown when the run has ended, e.g. generated text


REQUIRED = ("build_model", "train_batches", "loss", "evaluate")


def check_worker(worker: object) -> None:
    """Raises WorkerError unless `worker`, an object or a class, has all the methods of a Worker."""
    kind = worker if isinstance(worker, type) else type(worker)
    missing = [name for name in REQUIRED if not callable(getattr(worker, name, None))]
    if missing:
        raise WorkerError(
            f"{kind.__name__} can't be used as a worker: it lacks {', '.join(f'{m}()' for m in missing)}. "
            f"A worker needs {', '.join(f'{m}()' for m in REQUIRED)} (see lte_ray.Worker)."
        )


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_model(worker: Worker, seed: int) -> nn.Module:
    """The worker's model, built under `seed`, so that every process starts from equal weights.

    Raises:
        WorkerError: it isn't an `nn.Module`.
    """
    seed_everything(seed)
    model = worker.build_model()
    if not isinstance(model, nn.Module):
        raise WorkerError(f"{type(worker).__name__}.build_model() returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def endless_batches(worker: Worker, shard: Shard) -> Iterator[Batch]:
    """The worker's batches from `shard.cursor` on; an iterator that ends is asked for again, with the cursor moved on.

    Raises:
        WorkerError: it ended without a single batch.
    """
    cursor = shard.cursor
    while True:
        before = cursor
        batches = worker.train_batches(shard.at(cursor))
        if not isinstance(batches, Iterable):
            raise WorkerError(f"{type(worker).__name__}.train_batches() returned a {type(batches).__name__}, not an iterator.")
        for batch in batches:
            cursor += 1
            yield batch
        if cursor == before:
            raise WorkerError(
                f"{type(worker).__name__}.train_batches() ended at once, without a batch, for head {shard.head} of "
                f"{shard.num_heads} at cursor {cursor}. It must yield at least one batch for every shard."
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on `device`; tuples, lists, named tuples and dicts are walked through."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def count_samples(batch: Batch) -> int:
    """Samples in a batch: the first dimension of its first tensor, 1 if it holds none."""
    first = next(_tensors(batch), None)
    return first.shape[0] if first is not None and first.ndim else 1


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for item in items:
        yield from _tensors(item)


def worker_settings(worker: object) -> dict[str, Any]:
    """The worker's constructor arguments as it keeps them in attributes of the same names, for ``run.toml``."""
    parameters = inspect.signature(type(worker)).parameters
    return {name: getattr(worker, name) for name in parameters if hasattr(worker, name)}
