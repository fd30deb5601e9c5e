"""Does it pay that a thread reads batches ahead? Batches/s with `prefetch=2`, relative to none; the two alternate.

A training step of an MLP, with one torch thread, reads batches of `lte_ray.data.loader` from memory; from compressed items,
whose decompression releases Python's lock; and from items that each wait a millisecond, as a disk or a network makes them.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.report import repeat, report, spread
from lte_ray import Shard
from lte_ray.data import loader

RUNS, BATCHES, BATCH, WIDTH, ITEMS = 5, 60, 16, 1024, 512


class Items:
    """Items with an index: rows of noise, each read by `read`."""

    def __init__(self, rows: list[bytes], read: Callable[[bytes], bytes]) -> None:
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.frombuffer(self.read(self.rows[row]), dtype=np.float32).copy()


def wait(row: bytes) -> bytes:
    time.sleep(1e-3)
    return row


def sources() -> dict[str, Items]:
    """The data sets by name."""
    random = np.random.default_rng(0)
    rows = [random.normal(size=WIDTH).astype(np.float32).tobytes() for _ in range(ITEMS)]
    packed = [zlib.compress(row * 64) for row in rows]
    return {
        "memory": Items(rows, lambda row: row),
        "compressed": Items(packed, lambda row: zlib.decompress(row)[: WIDTH * 4]),
        "waiting": Items(rows, wait),
    }


def rate(data: Items, prefetch: int) -> float:
    """Batches/s of training steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = loader(data, Shard(0, 1, seed=0), BATCH, prefetch=prefetch)
    next(batches)
    begin = time.perf_counter()
    for batch in itertools.islice(batches, BATCHES):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return BATCHES / (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, data in sources().items():
        pairs = repeat(
            RUNS,
            lambda data=data: (rate(data, 2), rate(data, 0)),
            lambda pair, name=name: f"{name}: {pair[0]:.1f} batches/s with a thread, {pair[1]:.1f} without",
        )
        figures[f"batches_per_second_over_none_{name}"] = spread([ahead / none for ahead, none in pairs])
    report("prefetch", limits={}, met={}, figures=figures)


if __name__ == "__main__":
    main()
