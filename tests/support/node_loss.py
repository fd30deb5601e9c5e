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

CUT = 20.0
"""Seconds for which a node is cut off: longer than heads may be silent."""


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
        time.sleep(CUT)
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
