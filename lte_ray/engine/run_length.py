"""The length of a run in local steps, where the settings give it in epochs, samples or tokens."""

from __future__ import annotations

import math
from typing import Any

from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.worker import Batch, Worker, count_samples, count_tokens


def count_steps(worker: Worker, settings: Settings, batch: Batch, epoch: int | None) -> int:
    """Returns the local steps of each head.

    A step of all heads takes num_heads times accumulate batches. The run has the fewest steps with which all
    heads together take at least what was asked for.

    Args:
        batch: the worker's first one. All others count as equally large.
        epoch: batches of a pass through the data, as the worker asked its shard for them; None if it didn't.

    Raises:
        ConfigError: the worker doesn't say how many batches or tokens there are.
        WorkerError: what it says isn't a number above 0.
    """
    train, name = settings.train, type(worker).__name__
    if train.length is None:
        return train.steps
    wanted = float(getattr(train, train.length))
    if train.length == "epochs":
        given = getattr(worker, "batches_per_epoch", None)
        of_batches = epoch if given is None else _positive(name, "batches_per_epoch", given() if callable(given) else given)
        if of_batches is None:
            raise ConfigError(
                f"--epochs is {wanted:g}, but {name} doesn't say how much data there is. Take the batches of "
                "shard.indices(size, batch_size), give the worker batches_per_epoch (a number, or a method that returns it), "
                "or give --samples or --steps."
            )
        batches = wanted * of_batches
    elif train.length == "samples":
        batches = wanted / count_samples(batch)
    else:
        tokens = count_tokens(worker, batch)
        if tokens is None:
            raise ConfigError(
                f"--tokens is {wanted:g}, but {name}'s batches have no input_ids. Give the worker tokens_per_sample (a number, "
                "or a method that returns it), or give --samples or --steps."
            )
        batches = wanted / _positive(name, "tokens_per_sample", tokens)
    step = settings.lte.num_heads * train.accumulate
    return max(1, math.ceil(batches / step - 1e-9))  # 3 epochs of 0.1 are no more than 0.3


def _positive(worker: str, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise WorkerError(f"{worker}.{what} is {value!r}, but it must be a number above 0.")
    return value
