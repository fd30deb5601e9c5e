"""How a worker's loss is tried before the run: with copies of what it may change, on the CPU, and without Ray."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lte_ray.config import TrainConfig
from lte_ray.engine.head.optimization import autocast
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.worker import Batch, Worker

AUTO_CONNECT = "RAY_ENABLE_AUTO_CONNECT"


def trial_copies(worker: Worker, model: nn.Module, batch: Batch) -> tuple[Worker, nn.Module, Batch]:
    """Copies of the worker, of the model, in training mode, and of the batch. Raises what copying raises."""
    own = own_worker(copy.copy(worker))
    return own, copy.deepcopy(model, {id(worker): own}).train(), copy.deepcopy(batch)  # hooks may be methods of the worker


@contextmanager
def trial_conditions(train: TrainConfig) -> Iterator[None]:
    """Within the block, operations have the run's precision, and Ray connects to no cluster if the loss calls it."""
    with without_ray(), autocast(train, torch.device("cpu")):
        yield


@contextmanager
def without_ray() -> Iterator[None]:
    """Within the block, Ray connects to no cluster if the worker's code calls it.

    The driver hasn't connected yet, and what Ray finds by itself may be another cluster than the run's.
    """
    before = os.environ.get(AUTO_CONNECT)
    os.environ[AUTO_CONNECT] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[AUTO_CONNECT]
        else:
            os.environ[AUTO_CONNECT] = before
