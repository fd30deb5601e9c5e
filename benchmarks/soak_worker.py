"""The worker of the soak: a small network whose steps mostly sleep.

The sleep replaces a step on the head's own GPU. Four heads that compute all the time would compete for CPUs on a small machine,
and a head that restarts would slow the others down for an unrelated reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lte_ray import Shard
from workers.regression import Regression

SLEEP = 0.05
"""Seconds of each local step."""


@dataclass
class Paced(Regression):
    """Regression on a network so wide that its base (264 KB) goes through the object store, as with larger models."""

    width: int = 128
    """Inputs and outputs of both networks."""
    batch_size: int = 8
    """Samples of one head's batch."""
    samples: int = 4096
    """Training samples, shared by the heads."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        due = time.perf_counter()
        for batch in super().train_batches(shard):
            due = max(due + SLEEP, time.perf_counter())  # a late step isn't compensated
            time.sleep(max(0.0, due - time.perf_counter()))
            yield batch
