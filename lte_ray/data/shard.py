"""One head's part of the data: a deterministic sampler whose whole state is a few integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lte_ray.data.partition import advance, initial, ordered, slots
from lte_ray.messages import Partitions


@dataclass(frozen=True)
class Shard:
    """Which batches a head trains on.

    The data order is one endless row of batches for all heads, numbered 0, 1, 2, ... (slots). At the start head h of N takes
    the slots h, h + N, h + 2N, ...; when heads leave or join, a run hands slots that aren't taken yet from head to head
    (`lte_ray.data.partition`), so that none is trained twice and none left out.

    Attributes:
        head: the head's number.
        num_heads: how many heads share the data at the start.
        seed: seed of the order.
        cursor: batches that this head has taken already. `Worker.train_batches` starts behind them, so that a
            resumed run neither repeats nor skips a sample.
        lanes: which slots the head takes from here on; left out, those of the start after `cursor` batches.

    Raises:
        ValueError: a cursor below 0, numbers that are no lanes, or no lanes for a head that isn't in [0, num_heads).
    """

    head: int
    num_heads: int
    seed: int
    cursor: int = 0
    lanes: Partitions = ()

    def __post_init__(self) -> None:
        if self.cursor < 0:
            raise ValueError(f"the cursor is {self.cursor}: it counts batches, so it is at least 0")
        lanes = ordered(self.lanes) if self.lanes else advance(initial(self.head, self.num_heads), self.cursor)
        object.__setattr__(self, "lanes", lanes)

    def at(self, cursor: int) -> Shard:
        """The same shard, with `cursor` batches taken.

        Raises:
            ValueError: `cursor` lies behind this shard's own.
        """
        if cursor < self.cursor:
            raise ValueError(f"this shard has {self.cursor} batches taken; it can't go back to {cursor}")
        return Shard(self.head, self.num_heads, self.seed, cursor, advance(self.lanes, cursor - self.cursor))

    def slots(self) -> Iterator[int]:
        """The numbers of this head's batches, from the cursor on, ascending and without end.

        Each number belongs to exactly one batch of one head of the run, whichever heads leave or join. A worker with its own
        sampling makes batch g from (seed, g) and yields one for each number in turn: then its data are shared out anew as
        `indices` does it. One that looks only at `head`, `num_heads` and `cursor` repeats and skips when heads change.
        """
        return slots(self.lanes)

    def indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Endless batches of sample indices in [0, size): f(seed, slot).

        An epoch is a permutation of all samples, drawn from (seed, epoch), and holds P = size // batch_size batches, however
        many heads there are: slot g is batch g mod P of epoch floor(g / P). So in one epoch all heads together see no
        sample twice, and only the tail of the permutation that doesn't fill a batch is left out of it.

        Raises:
            ValueError: there are fewer samples than one batch, or the batch size is below 1.
        """
        if batch_size < 1 or size < batch_size:
            raise ValueError(f"{size} samples can't fill a batch of {batch_size}; use more data, or a smaller batch")
        return self._indices(size, batch_size)

    def _indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        batches, current, order = size // batch_size, -1, np.empty(0, np.int64)
        for slot in self.slots():
            epoch, place = divmod(slot, batches)
            if epoch != current:
                current, order = epoch, _permutation(self.seed, epoch, size)
            yield order[place * batch_size : (place + 1) * batch_size].copy()  # the heads of a process share the order


@lru_cache(maxsize=2)  # at the border of two epochs, a process's heads are in both
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
