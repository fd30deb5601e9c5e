"""What reporting costs: the CPU time of sinks, relative to that of training; with --pairs also samples/s with and without.

The CPU time hardly depends on what else the machine does. A sink's is that of its thread for a row of 8 heads, which it may
take from the heads of one machine; training's is that of two heads of `workers.gpt:GPT` between two merges.

The pairs train a small GPT that merges several times a second, in one Ray, and alternate which comes first. The rate is taken
from the second merge to the last. They need a machine that does nothing else.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from benchmarks.report import repeat, report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.run.metrics import SilentReporter
from lte_ray.run.sinks.csv import CsvSink
from lte_ray.run.sinks.figures import RowNaming
from lte_ray.run.sinks.protocol import RunInfo, Sink
from lte_ray.run.sinks.tensorboard import TensorBoardSink
from workers.gpt import GPT

PAIRS, STEPS, ROWS = 8, 150, 300

NONE: dict[str, Any] = {"log": ["none"]}
ARMS: dict[str, dict[str, Any]] = {"sinks": {"log": ["tensorboard", "csv", "prometheus"]}}
"""What is compared with a run that reports nothing but `metrics.jsonl`: arguments of LTETrainer."""


def samples_per_second(arguments: dict[str, Any]) -> float:
    """Of all heads together."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(width=64, depth=2, context=64),
            lte=LTEConfig(num_heads=2, lora_r=16, lora_alpha=32),
            merge=MergeConfig(merge_iter=5),
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0, threads_per_head=1),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
            **arguments,
        ).fit()
    merges = result.metrics_dataframe[result.metrics_dataframe["kind"] == "merge"]
    at, samples = merges["at"].to_list(), merges["samples"].to_list()
    return float((samples[-1] - samples[1]) / (at[-1] - at[1]))


def cpu_seconds_per_row(make: Callable[[], Sink]) -> float:
    """What a sink and the naming of figures use in this process for the row of a merge of 8 heads."""
    by_head = {str(head): 1.0 + head for head in range(8)}
    fields = dict.fromkeys(("train_loss", "lag", "weight", "stall_seconds", "head_steps", "gradient_norm", "memory"), by_head)
    naming, sink = RowNaming(), make()
    with tempfile.TemporaryDirectory() as folder:
        sink.open(RunInfo("r", "ab12", folder, Path(folder)))
        started = time.process_time()  # with the threads of a sink's own
        for version in range(1, ROWS + 1):
            place = {"kind": "merge", "at": 1.0 + version, "version": version, "step": version, "samples": 1, "heads": [0]}
            for row in naming.name({**place, **fields, "merge_seconds": 0.5, "bytes_up": 5}):
                sink.row(row)
        sink.close("finished")
        return (time.process_time() - started) / ROWS


def training_cpu_seconds() -> float:
    """What the two heads of `workers.gpt:GPT` use between two merges, by default."""
    used = []
    for steps in (10, 30):  # one merge, whose time includes the start, and three
        started = time.process_time()
        train = TrainConfig(steps=steps, threads_per_head=1)
        run_in_process(GPT(), Settings("r", LTEConfig(num_heads=2), MergeConfig(), train))
        used.append(time.process_time() - started)
    return (used[1] - used[0]) / 2


def compare(arguments: dict[str, Any]) -> list[tuple[float, float]]:
    """Samples/s with and without reporting, in pairs on Ray."""
    turn = iter(range(PAIRS))

    def pair() -> tuple[float, float]:
        if next(turn) % 2:
            on = samples_per_second(arguments)
            return on, samples_per_second(NONE)
        off = samples_per_second(NONE)
        return samples_per_second(arguments), off

    return repeat(PAIRS, pair, lambda both: f"{both[0]:.0f} samples/s with, {both[1]:.0f} without: {both[0] / both[1]:.3f}")


def main() -> None:
    training = training_cpu_seconds()
    sinks = {name: cpu_seconds_per_row(make) for name, make in (("tensorboard", TensorBoardSink), ("csv", CsvSink))}
    share = sum(sinks.values()) / training
    limits, met = {"cpu": "sinks' CPU time of a row to that of training between two rows <= 0.01"}, {"cpu": share <= 0.01}
    figures: dict[str, Any] = {
        "cpu_share": round(share, 6),
        "training_cpu_seconds": round(training, 4),
        "sink_cpu_seconds": {name: round(seconds, 6) for name, seconds in sinks.items()},
    }
    if "--pairs" in sys.argv:
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        samples_per_second(NONE)  # fills the caches
        for name, arguments in ARMS.items():
            ratio = figures[f"{name}_ratio"] = spread([on / off for on, off in compare(arguments)])
            limits[name], met[name] = "ratio of samples/s with to without, median >= 0.99", ratio["median"] >= 0.99
    report("reporting", limits=limits, met=met, figures=figures)


if __name__ == "__main__":
    main()
