"""One head's part of the data: a deterministic sampler whose whole state is one integer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shard:
    """Which samples a head trains on.

    Attributes:
        head: the head's number, 0 to num_heads - 1.
        num_heads: how many heads share the data.
        seed: seed of the order.
        cursor: batches that this head has taken already. `Worker.train_batches` starts behind them, so that a
            resumed run neither repeats nor skips a sample.
    """

    head: int
    num_heads: int
    seed: int
    cursor: int = 0

    def at(self, cursor: int) -> Shard:
        """The same shard, with `cursor` batches taken."""
        return dataclasses.replace(self, cursor=cursor)

    def indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Endless batches of sample indices in [0, size): f(seed, epoch, head, step).

        Each epoch is a new permutation of all samples; heads take disjoint parts of it, so that in one epoch no sample
        is seen twice. What doesn't fill a batch for every head is left out of that epoch.

        Raises:
            ValueError: there are fewer samples than one batch for every head.
        """
        steps = size // (batch_size * self.num_heads)
        if steps < 1:
            raise ValueError(
                f"{size} samples can't fill a batch of {batch_size} for each of {self.num_heads} heads; "
                "use more data, a smaller batch, or fewer heads"
            )
        cursor = self.cursor
        while True:
            epoch, step = divmod(cursor, steps)
            order = np.random.default_rng([self.seed, epoch]).permutation(size)
            for k in range(step, steps):
                start = (k * self.num_heads + self.head) * batch_size
                yield order[start : start + batch_size]
                cursor += 1
