"""One head's shard of the data: a deterministic sampler whose entire state is a few integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lte_ray.data.partition import advance, initial_partitions, slots, to_partitions
from lte_ray.messages import PartitionPairs


@dataclass(frozen=True)
class Shard:
    """Which batches a head trains on.

    All heads share one endless order of batches, numbered 0, 1, 2, ... (slots). At the start, head h of N trains the slots
    h, h + N, h + 2N, ... When heads leave or join, untrained slots move from head to head (`lte_ray.data.partition`), so
    that none is trained twice and none is left out.

    Attributes:
        head: the head's number.
        num_heads: how many heads share the data at the start.
        seed: seed of the order.
        cursor: number of batches that this head has already taken. `Worker.train_batches` starts after them, so that a
            resumed run neither repeats nor skips a sample.
        lanes: the partitions of slots, as (start, stride) pairs, from which the head takes its next batches; by default
            the initial ones after `cursor` batches.

    Raises:
        ValueError: the cursor is below 0, `lanes` aren't partitions, or `lanes` is empty and `head` isn't in [0, num_heads).
    """

    head: int
    num_heads: int
    seed: int
    cursor: int = 0
    lanes: PartitionPairs = ()

    def __post_init__(self) -> None:
        if self.cursor < 0:
            raise ValueError(f"the cursor is {self.cursor}: it counts batches, so it must be at least 0")
        if self.lanes:
            partitions = to_partitions(self.lanes)
        else:
            partitions = advance(initial_partitions(self.head, self.num_heads), self.cursor)
        object.__setattr__(self, "lanes", partitions)

    def at(self, cursor: int) -> Shard:
        """Returns the same shard after `cursor` batches.

        Raises:
            ValueError: `cursor` is below this shard's own.
        """
        if cursor < self.cursor:
            raise ValueError(f"this shard has taken {self.cursor} batches already; it can't go back to {cursor}")
        return Shard(self.head, self.num_heads, self.seed, cursor, advance(self.lanes, cursor - self.cursor))

    def slots(self) -> Iterator[int]:
        """Yields the numbers of this head's batches from the cursor on, ascending and endless.

        Each number belongs to exactly one batch of one head of the run, whichever heads leave or join. A worker with its own
        sampling makes batch g from (seed, g) and yields one for each number in turn: then its data are redistributed as those
        of `indices` are. A worker that uses only `head`, `num_heads` and `cursor` repeats and skips batches when heads change.
        """
        return slots(self.lanes)

    def indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yields batches of sample indices in [0, size), endlessly: f(seed, slot).

        An epoch is a permutation of all samples, drawn from (seed, epoch). It contains P = size // batch_size batches,
        independent of the number of heads: slot g is batch g mod P of epoch floor(g / P). So within an epoch all heads
        together see no sample twice, and leave out only the tail of the permutation that doesn't fill a batch.

        Raises:
            ValueError: there are fewer samples than one batch needs, or the batch size is below 1.
        """
        if batch_size < 1 or size < batch_size:
            raise ValueError(f"{size} samples can't fill a batch of {batch_size}; use more data, or a smaller batch")
        return self._indices(size, batch_size)

    def _indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        batches, current, order = size // batch_size, -1, np.empty(0, np.int64)
        for slot in self.slots():
            epoch, batch = divmod(slot, batches)
            if epoch != current:
                current, order = epoch, _permutation(self.seed, epoch, size)
            yield order[batch * batch_size : (batch + 1) * batch_size].copy()  # heads of one process share the order


@lru_cache(maxsize=2)  # around the end of an epoch, the heads of a process are in two epochs
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
