"""Samples/s of 2 heads under Ray with merge_iter = 10, relative to 2 bare processes that run the same heads and never merge.

Both train `workers.gpt:GPT` with one thread per head, and alternate. The start of a run doesn't count: under Ray the rate is
taken from the first merge to the last, so every wait, transfer, merge and rebase between them counts; in the bare processes
from the end of the first step to the end of the last. The bare processes keep freed memory, too, and run at the niceness of
Ray's workers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.bare import steps_per_second
from benchmarks.report import repeat, report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.run.metrics import SilentReporter
from workers.gpt import GPT

RUNS, STEPS, HEADS = 5, 160, 2


def under_ray() -> tuple[float, dict[str, float]]:
    """Samples/s of all heads together, and the shares of a head's time."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(),
            lte=LTEConfig(num_heads=HEADS),
            merge=MergeConfig(merge_iter=10),
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0, threads_per_head=1),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    rate = sum(row["samples"] for row in merges[1:]) / (merges[-1]["at"] - merges[0]["at"])
    assert result.metrics is not None
    times = result.metrics["times"]
    shares = {name: round(spent / sum(times.values()), 5) for name, spent in times.items()}
    shares["of the wait, merging"] = round(result.metrics["merge_seconds"] / sum(times.values()), 5)
    return rate, shares


def main() -> None:
    worker = GPT()

    def pair() -> tuple[tuple[float, dict[str, float]], float]:
        return under_ray(), worker.batch_size * steps_per_second(worker, [STEPS] * HEADS)

    def describe(pair: tuple[tuple[float, dict[str, float]], float]) -> str:
        (rate, _), other = pair
        return f"{rate:.1f} samples/s under Ray, {other:.1f} in bare processes, ratio {rate / other:.3f}"

    pairs = repeat(RUNS, pair, describe)
    ratio = spread([rate / other for (rate, _), other in pairs])
    middle = sorted(pairs, key=lambda pair: pair[0][0] / pair[1])[RUNS // 2]
    report(
        "efficiency",
        limits={"efficiency": "ratio to bare processes, median >= 0.95"},
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
