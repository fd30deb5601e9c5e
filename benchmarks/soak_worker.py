"""What the heads of the soak train: a small network whose steps mostly sleep.

The sleep stands in for a step on the head's own GPU: four heads that compute all the time would take each other's CPU on a
small machine, and one that starts again would slow the others down for a reason that has nothing to do with it.
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
    """Regression on so wide a network that its base (264 KB) travels through the object store, as larger models' do."""

    width: int = 128
    """Inputs and outputs of both networks."""
    batch_size: int = 8
    """Samples of one head's batch."""
    samples: int = 4096
    """Training samples, shared by the heads."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        due = time.perf_counter()
        for batch in super().train_batches(shard):
            due = max(due + SLEEP, time.perf_counter())  # a step that came late isn't made up for
            time.sleep(max(0.0, due - time.perf_counter()))
            yield batch
