"""Useful local steps/s of 4 heads, one of them 4 times slower, relative to their steps/s without communication.

All train `workers.gpt:GPT` on small batches and sleep after each step, so that they don't compete for cores: any loss is due
to merging. A step is useful if it was merged. Each head's rate counts the contributions after its first one up to the one
before the last (the last steps of a run are divided into smaller pieces), and the time between these two. The limit comes from
4 bare processes with the same heads that never merge. The kinds alternate. A stall is the time for which a merge keeps a head
from training.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.bare import steps_per_second
from benchmarks.report import repeat, report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.run.metrics import SilentReporter
from workers.gpt import GPT

HEADS, STEPS, RUNS, MERGE_ITER = 4, 100, 3, 10
SLEEP, SLOWER, SLOW_HEAD = 0.08, 4, 3
KINDS = {
    "async": MergeConfig(merge_iter=MERGE_ITER, when="arrival", wait=False),
    "quorum": MergeConfig(merge_iter=MERGE_ITER, when="quorum", quorum=2, wait=False),
    "quorum, waiting": MergeConfig(merge_iter=MERGE_ITER, when="quorum", quorum=2),
    "barrier": MergeConfig(merge_iter=MERGE_ITER),
}


class Throttled(GPT):
    """GPT on two windows of 64 bytes that sleeps in each step; steps of head 3 take four times as long."""

    def __init__(self) -> None:
        super().__init__(context=64, batch_size=2)

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        started = time.perf_counter()
        for batch in super().train_batches(shard):
            slower = SLOWER if shard.head == SLOW_HEAD else 1
            yield batch
            computed = time.perf_counter() - started
            time.sleep(slower * SLEEP + (slower - 1) * computed)
            started = time.perf_counter()


def under_ray(merge: MergeConfig) -> dict[str, Any]:
    """Merged steps/s, summed over the heads, and the median stall of a merge in seconds."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            Throttled(),
            lte=LTEConfig(num_heads=HEADS),
            merge=merge,
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0, threads_per_head=1, budget="shared"),
            scaling_config=PlacementConfig(cpus_per_head=0.5),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    rate = 0.0
    for head in range(HEADS):
        rows = [row for row in merges if head in row["heads"]][:-1]
        rate += sum(row["head_steps"][str(head)] for row in rows[1:]) / (rows[-1]["at"] - rows[0]["at"])
    stalls = [stall for row in merges[HEADS:] for stall in row["stall_seconds"].values()]
    assert result.metrics is not None
    times = result.metrics["times"]
    return {
        "rate": rate,
        "stall": statistics.median(stalls),
        "times": {name: round(spent / sum(times.values()), 5) for name, spent in times.items()},
    }


def main() -> None:
    alone = [STEPS // SLOWER if head == SLOW_HEAD else STEPS for head in range(HEADS)]

    def run() -> tuple[dict[str, dict[str, Any]], float]:
        return {name: under_ray(merge) for name, merge in KINDS.items()}, steps_per_second(Throttled(), alone)

    def describe(run: tuple[dict[str, dict[str, Any]], float]) -> str:
        ours, limit = run
        return ", ".join(f"{name} {ours[name]['rate'] / limit:.3f}" for name in KINDS) + " of the limit"

    runs = repeat(RUNS, run, describe)
    useful = {name: spread([ours[name]["rate"] / limit for ours, limit in runs]) for name in KINDS}
    step = HEADS / statistics.median([limit for _, limit in runs])  # the harmonic mean of the heads' step times
    stall = spread([ours["async"]["stall"] for ours, _ in runs])
    over_round = stall["median"] / (step * MERGE_ITER)
    report(
        "async",
        limits={
            "async": "merged steps/s, ratio to those without communication, median >= 0.97",
            "quorum": "two contributions, heads don't wait, the same ratio: median >= 0.9",
            "stall": "a head's stall at a merge, ratio to the time of its 10 steps, median <= 0.02",
        },
        met={
            "async": useful["async"]["median"] >= 0.97,
            "quorum": useful["quorum"]["median"] >= 0.9,
            "stall": over_round <= 0.02,
        },
        figures={
            "useful_over_limit": useful,
            "steps_per_second": {name: spread([ours[name]["rate"] for ours, _ in runs]) for name in KINDS},
            "limit_steps_per_second": spread([limit for _, limit in runs]),
            "stall_seconds": stall,
            "stall_over_one_step": round(stall["median"] / step, 4),
            "stall_over_a_round": round(over_round, 5),
            "times_async": runs[0][0]["async"]["times"],
        },
    )


if __name__ == "__main__":
    main()
