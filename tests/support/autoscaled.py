"""A run on a cluster that has no nodes for heads yet, and an autoscaler that adds pretended ones; runs as a program.

Usage: unshare --net --pid --mount --fork --kill-child --mount-proc python autoscaled.py FOLDER MAX_NODES. Nodes have two CPUs,
and the run has four heads. Prints what `ray status` says while it waits, then which heads merges had, as JSON. It mounts a
/tmp/ray of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID  # noqa: E402
from ray.cluster_utils import AutoscalingCluster  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lte_ray import FailureConfig, LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from lte_ray.runtime.controller import failure_handling  # noqa: E402
from tests.support.ray_runs import settings, storage  # noqa: E402
from workers.regression import Regression  # noqa: E402

ADDRESS = "127.0.0.1:6379"
SPOT = {"ray.io/market-type": "spot"}
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_enable_autoscaler_v2": "1",
}
"""What `ray.cluster_utils.AutoscalingCluster` sets. Its own `start` would first end every other Ray of this machine."""


class SlowRegression(Regression):
    """Takes 20 ms per step, so that heads can join while it trains."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.02)
        return super().loss(model, batch)


def start_ray(max_nodes: int) -> subprocess.Popen[bytes]:
    """Starts Ray's head node, which no head of a run fits on, with an autoscaler."""
    kind = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": max_nodes, "labels": SPOT}
    config = AutoscalingCluster({"CPU": 0}, {"spot": kind}, autoscaler_v2=True)._config
    path = Path("/tmp/ray/autoscaling.json")
    path.write_text(json.dumps(config))
    flags = ["--head", "--block", "--num-cpus", "0", "--port", "6379", "--include-dashboard", "false", "--disable-usage-stats"]
    command = ["ray", "start", *flags, f"--autoscaling-config={path}"]
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)


def connect() -> None:
    """Connects to that Ray once it answers."""
    for left in range(60, -1, -1):
        try:
            ray.init(ADDRESS, logging_level="error", log_to_driver=False)
            return
        except ConnectionError:
            if not left:
                raise
            time.sleep(1)


def show_status() -> None:
    """Prints what `ray status` says once it shows a demand."""
    while True:
        status = subprocess.run(["ray", "status", "--address", ADDRESS], capture_output=True, text=True, check=False).stdout
        demands = status.partition("Pending Demands:")[2].strip()
        if demands and "(no resource demands)" not in demands:
            print(demands, flush=True)
            return
        time.sleep(0.5)


def main(folder: Path, max_nodes: int) -> None:
    """Runs, and prints what the test looks at."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    head = start_ray(max_nodes)
    connect()
    threading.Thread(target=show_status, daemon=True).start()
    failure_handling.GROW_EVERY = 1.0
    config = settings(200) | {
        "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=10, merge_threads=1),
    }
    placed = PlacementConfig(cpus_per_head=1.0, resource_timeout=120 if max_nodes > 1 else 20, head_labels=SPOT)  # type: ignore[arg-type]
    failure = FailureConfig() if max_nodes > 1 else FailureConfig(exhausted="drop", min_heads=2)
    LTETrainer(SlowRegression(), run_config=storage(folder, "r"), scaling_config=placed, failure=failure, **config).fit()
    rows = [json.loads(row) for row in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps(sorted({tuple(row["heads"]) for row in rows if row["kind"] == "merge"})), flush=True)
    ray.shutdown()
    head.terminate()
    head.wait()


if __name__ == "__main__":
    subprocess.run("ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray", shell=True, check=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
