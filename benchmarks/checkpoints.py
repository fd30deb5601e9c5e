"""The cost of checkpoints: a run that writes one at every merge, relative to the same run without checkpoints.

Two heads of `workers.gpt:GPT` with one thread each, which don't wait for each other and contribute every 10 steps; the kinds
alternate. The stall is the time for which a checkpoint stops a head's training: the head copies its state between two steps,
and its process writes the copy while training continues (`times.checkpoint` of the result). Samples/s are taken from the first
merge to the last. On a machine with two cores, both heads occupy one each, so writing takes time from them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import repeat, report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.run.metrics import SilentReporter
from workers.gpt import GPT

RUNS, STEPS, HEADS, MERGE_ITER = 3, 120, 2, 10


def run(every: int) -> dict[str, Any]:
    """Samples/s; the number of checkpoints, their size, and the seconds for which each stopped a head's training."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(),
            lte=LTEConfig(num_heads=HEADS),
            merge=MergeConfig(merge_iter=MERGE_ITER, when="arrival", wait=False),
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=every, threads_per_head=1),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=StorageConfig(name="run", storage=storage, keep_checkpoints=None),
            reporter=SilentReporter(),
        ).fit()
        folder = Path(storage) / "run"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        saved = [path.parent for path in folder.glob("checkpoints/*/manifest.json")]
        sizes = [sum(file.stat().st_size for file in version.iterdir()) for version in saved]
    merges = [row for row in rows if row["kind"] == "merge"]
    assert result.metrics is not None
    times = result.metrics["times"]
    return {
        "rate": sum(row["samples"] for row in merges[1:]) / (merges[-1]["at"] - merges[0]["at"]),
        "checkpoints": len(saved),
        "mebibytes": max(sizes) / 2**20,
        "stall": times["checkpoint"] / len(saved),
        "round": MERGE_ITER * times["train"] / STEPS,
    }


def main() -> None:
    def describe(pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
        often, never = pair
        return f"{often['rate']:.1f} samples/s with checkpoints, {never['rate']:.1f} without, stall {often['stall']:.4f} s"

    pairs = repeat(RUNS, lambda: (run(1), run(0)), describe)
    stall = spread([often["stall"] for often, _ in pairs])
    share = spread([often["stall"] / often["round"] for often, _ in pairs])
    ratio = spread([often["rate"] / never["rate"] for often, never in pairs])
    report(
        "checkpoints",
        limits={"stall": "stall of a head for a checkpoint, ratio to the time of a round of 10 steps: median <= 0.02"},
        met={"stall": share["median"] <= 0.02},
        figures={
            "stall_seconds_of_a_checkpoint": stall,
            "stall_over_a_round": share,
            "checkpoints": [often["checkpoints"] for often, _ in pairs],
            "mebibytes_of_a_checkpoint": round(pairs[0][0]["mebibytes"], 1),
            "samples_per_second_over_no_checkpoints": ratio,
        },
    )


if __name__ == "__main__":
    main()
