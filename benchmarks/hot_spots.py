"""Where a local step and a merge of the main job spend their time: a table, traces for Perfetto, and a flame graph.

The table is made of the traces of `--profile`, which name the parts of a step and of a merge: two heads on Ray train
`workers.gpt:GPT`, and 20 steps with 2 merges are recorded. Recording itself slows small operations down, so shares count, not
milliseconds. The flame graph is made by py-spy of the same job in one process. All files are written into the folder
``profile``.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import report
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.run.metrics import SilentReporter
from lte_ray.runtime.tracing import FOLDER
from workers.gpt import GPT

FIRST, LAST, HEADS = 21, 40, 2
OUT = Path("profile")
PARTS = {
    "head-0": ("read batch", "forward and backward", "optimizer step", "publish", "wait", "rebase", "checkpoint"),
    "coordinator": ("verify checksums", "decode", "merge", "publish"),
}
"""The parts that the traces name, by process."""


def record() -> dict[str, list[dict[str, Any]]]:
    """Trains under Ray, keeps the traces in `OUT`, and returns their events by process."""
    with tempfile.TemporaryDirectory() as storage:
        LTETrainer(
            GPT(),
            lte=LTEConfig(num_heads=HEADS),
            merge=MergeConfig(merge_iter=10),
            train=TrainConfig(steps=LAST + 20, eval_every=0, checkpoint_every=0, threads_per_head=1, profile=f"{FIRST}:{LAST}"),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        shutil.copytree(Path(storage) / "run" / FOLDER, OUT, dirs_exist_ok=True)
    return {name: json.loads(gzip.decompress((OUT / f"{name}.json.gz").read_bytes()))["traceEvents"] for name in PARTS}


def parts_of(events: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """How often each part occurs, and its milliseconds in all and each time."""
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in names:
            spent[event["name"]].append(event["dur"] / 1000)
    return {
        name: {
            "calls": len(spent[name]),
            "ms": round(sum(spent[name]), 1),
            "ms_each": round(sum(spent[name]) / len(spent[name]), 2),
        }
        for name in names
        if spent[name]
    }


def own_times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each operation without those that it calls, the longest first."""
    own: dict[str, float] = collections.defaultdict(float)
    for thread in _by_thread(events).values():
        open_ones: list[tuple[float, str]] = []  # end and name
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ones and open_ones[-1][0] <= event["ts"]:
                open_ones.pop()
            own[event["name"]] += event["dur"] / 1000
            if open_ones:
                own[open_ones[-1][1]] -= event["dur"] / 1000
            open_ones.append((event["ts"] + event["dur"], event["name"]))
    return dict(sorted(((name, round(ms, 1)) for name, ms in own.items()), key=lambda item: -item[1]))


def _by_thread(events: list[dict[str, Any]]) -> Mapping[int, list[dict[str, Any]]]:
    threads: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    return threads


def rows(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[tuple[str, ...]]:
    for process, named in parts.items():
        whole = sum(part["ms"] for part in named.values())
        for name, part in sorted(named.items(), key=lambda item: -item[1]["ms"]):
            yield process, name, str(part["calls"]), f"{part['ms']:.1f}", f"{part['ms_each']:.2f}", f"{part['ms'] / whole:.1%}"


def draw_flame_graph() -> str:
    """Samples the same job in one process; returns the file, or why there is none."""
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        return "none: py-spy isn't installed"
    file = OUT / "flame-graph.svg"
    command = [program, "record", "--rate", "50", "--output", str(file), "--", sys.executable, "-m", "benchmarks.hot_spots"]
    done = subprocess.run([*command, "--in-process"], capture_output=True, text=True, check=False)
    return (
        str(file)
        if done.returncode == 0
        else f"none: {done.stderr.strip().splitlines()[-1] if done.stderr else 'py-spy failed'}"
    )


def train_in_process() -> None:
    """Trains the heads in this process, for the flame graph."""
    train = TrainConfig(steps=60, eval_every=0, checkpoint_every=0)
    run_in_process(GPT(), Settings("profile", LTEConfig(num_heads=HEADS), MergeConfig(merge_iter=10), train))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process", action="store_true", help="only train in this process, for py-spy")
    if parser.parse_args().in_process:
        return train_in_process()
    OUT.mkdir(exist_ok=True)
    events = record()
    parts = {name: parts_of(events[name], PARTS[name]) for name in PARTS}
    table = Table(
        "process", "part", "calls", "ms", "ms each", "share", title=f"steps {FIRST} to {LAST} of the main job, {HEADS} heads"
    )
    for row in rows(parts):
        table.add_row(*row)
    Console().print(table)
    flame_graph = draw_flame_graph()
    print(f"traces: {OUT}/*.json.gz (open them in https://ui.perfetto.dev); flame graph: {flame_graph}")
    operations = {name: dict(list(own_times(events[name]).items())[:15]) for name in PARTS}
    report("hot_spots", limits={}, met={}, figures={"parts": parts, "own_ms_of_operations": operations})
    return None


if __name__ == "__main__":
    main()
