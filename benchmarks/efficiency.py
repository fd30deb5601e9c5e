"""Samples/s of 2 heads under Ray with merge_iter = 10, over 2 bare processes that run the same heads and never merge.

Both train `workers.gpt:GPT` with one thread each. The two are alternated. Each rate is taken without the start: under Ray
from the first merge to the last (so every wait, transfer, merge and rebase between them counts), in the bare processes from
the end of the first step to the end of the last. They, too, keep freed memory and run
at the niceness that Ray gives to its workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.engine.head import Head
from lte_ray.engine.initial import prepare
from lte_ray.engine.memory import keep_freed_memory
from lte_ray.engine.settings import Settings
from lte_ray.metrics import Silent
from workers.gpt import GPT

RUNS, STEPS, HEADS = 5, 160, 2
NICENESS = 15  # at which Ray runs its workers


def under_ray() -> tuple[float, dict[str, float]]:
    """Samples/s of all heads together, and where a head's time went (shares)."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(),
            lte=LTEConfig(num_heads=HEADS),
            merge=MergeConfig(merge_iter=10),
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0, threads_per_head=1),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=Silent(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    rate = sum(row["samples"] for row in merges[1:]) / (merges[-1]["at"] - merges[0]["at"])
    assert result.metrics is not None
    times = result.metrics["times"]
    shares = {name: round(spent / sum(times.values()), 5) for name, spent in times.items()}
    shares["of the wait, merging"] = round(result.metrics["merge_seconds"] / sum(times.values()), 5)
    return rate, shares


def _bare_head(number: int, start: Barrier, rates: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the heads' actors
    os.nice(NICENESS)
    settings = Settings("bare", LTEConfig(num_heads=HEADS), MergeConfig(merge_iter=STEPS), TrainConfig(steps=STEPS))
    worker = GPT()
    head = Head(worker, settings, number)
    head.start(0, prepare(worker, settings).base)
    start.wait()
    head.train_round()
    status = head.status()
    assert status.last_step_at is not None
    assert status.first_step_at is not None
    rates.put(worker.batch_size * (STEPS - 1) / (status.last_step_at - status.first_step_at))


def bare() -> float:
    """Samples/s of as many processes together, which only train."""
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(HEADS), context.Queue()
    processes = [context.Process(target=_bare_head, args=(n, start, rates)) for n in range(HEADS)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return total


def main() -> None:
    pairs = [(under_ray(), bare()) for _ in range(RUNS)]
    ratio = spread([rate / other for (rate, _), other in pairs])
    middle = sorted(pairs, key=lambda pair: pair[0][0] / pair[1])[RUNS // 2]
    report(
        "efficiency",
        limits={"efficiency": "median over bare processes >= 0.95"},
        met={"efficiency": ratio["median"] >= 0.95},
        figures={
            "samples_per_second": spread([rate for (rate, _), _ in pairs]),
            "bare_samples_per_second": spread([other for _, other in pairs]),
            "ratio": ratio,
            "shares_of_a_heads_time_in_the_median_run": middle[0][1],
        },
    )


if __name__ == "__main__":
    main()
