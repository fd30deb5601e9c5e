"""Virtual heads and heads in separate actors on the same CPUs: samples/s and memory, for `benchmarks.modes`.

Both train `workers.gpt:GPT` under Ray and merge every 10 steps. The rate is taken from the third merge to the last: before,
virtual heads are tried one by one and concurrently. Memory is the proportional set size of all processes that host heads, the
maximum during training.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.run.metrics import SilentReporter
from workers.gpt import GPT

STEPS, HEADS, CPUS, TRIAL = 80, 8, 2, 3


class MemoryWatch(threading.Thread):
    """Reads every 0.5 s the memory of this process's descendants that host heads."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.peak = max(self.peak, sum(map(_proportional_bytes, _head_processes())))

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def _head_processes() -> list[int]:
    parents, hosts = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(b"ray::HeadActor"):
                    hosts.append(int(folder.name))
            except OSError:  # it has just ended
                continue

    def ours(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    return [pid for pid in hosts if ours(pid)]


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(heads_per_actor: int, stack: str = "auto") -> tuple[float, int]:
    """Samples/s of all heads together, and the bytes of their processes."""
    watch = MemoryWatch()
    watch.start()
    with tempfile.TemporaryDirectory() as storage:
        LTETrainer(
            GPT(),
            lte=LTEConfig(num_heads=HEADS),
            merge=MergeConfig(merge_iter=10),
            train=TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0),
            scaling_config=PlacementConfig(
                heads_per_actor=heads_per_actor, cpus_per_head=CPUS * heads_per_actor / HEADS, stack_heads=stack
            ),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    return sum(row["samples"] for row in merges[TRIAL:]) / (merges[-1]["at"] - merges[TRIAL - 1]["at"]), watch.end()
