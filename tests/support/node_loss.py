"""A run on three nodes, one of which is lost, or cut off for a while; runs as a program with its own cluster.

Usage: python node_loss.py FOLDER lose|cut|leave. Prints the result's metrics; exits with 0 if the run finished.
lose: another node joins at once; leave: only after the run has dropped the heads without resources.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
import torch  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from torch import nn  # noqa: E402

from lte_ray import FailureConfig, LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from lte_ray.runtime import placement  # noqa: E402
from lte_ray.runtime.controller import failure_handling  # noqa: E402
from tests.support.ray_runs import descendants, settings, storage  # noqa: E402
from workers.regression import Regression  # noqa: E402

LONGEST_CUT = 300.0
"""Seconds after which a node that was cut off comes back even if its processes weren't missed."""


class SlowRegression(Regression):
    """Takes 30 ms per step, so that events happen while it trains."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(0.03)
        return super().loss(model, batch)


def count_rows(folder: Path, what: str) -> int:
    """Counts occurrences of a text in the run's metrics."""
    try:
        return (folder / "r" / "metrics.jsonl").read_text().count(what)
    except OSError:
        return 0


def is_missed(folder: Path) -> bool:
    """Whether the run has replaced what the node ran: its two heads, or the coordinator."""
    heads = count_rows(folder, '"head_lost"') + count_rows(folder, '"head_hung"')
    return heads >= 2 or count_rows(folder, '"coordinator_lost"') > 0


def main(folder: Path, what: str) -> int:
    """Runs the scenario; returns 0 if the run finished."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    other = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    if what == "leave":
        placement.PATIENCE, failure_handling.GROW_EVERY = 5.0, 1.0
    config = settings(600 if what == "leave" else 300) | {
        "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=5, merge_threads=1, when="arrival", wait=False),
    }
    placed = PlacementConfig(cpus_per_head=1.0)
    failure = FailureConfig(exhausted="drop" if what == "leave" else "stop")
    trainer = LTETrainer(SlowRegression(), run_config=storage(folder, "r"), scaling_config=placed, failure=failure, **config)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(trainer.fit().metrics), daemon=True)
    thread.start()
    while count_rows(folder, '"kind": "merge"') < 20 and thread.is_alive():
        time.sleep(0.1)
    if what in ("lose", "leave"):
        cluster.remove_node(other, allow_graceful=False)
        while what == "leave" and count_rows(folder, '"head_dropped"') < 2 and thread.is_alive():
            time.sleep(0.1)
        cluster.add_node(num_cpus=2)
    else:
        raylet = other.all_processes["raylet"][0].process.pid
        stopped = [raylet, *descendants(raylet)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + LONGEST_CUT
        while not is_missed(folder) and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.1)
        for pid in stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:  # its node was given up
                continue
    thread.join(timeout=600)
    if found:
        print(json.dumps({name: found[0][name] for name in ("step", "samples", "version")}), flush=True)
    ray.shutdown()
    cluster.shutdown()
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
