"""Runs of four heads on two nodes; runs as a program with its own cluster.

Usage: python shared_fetches.py FOLDER. For each way down it prints, as JSON: the bytes of all objects that were put or copied
into the object store of one of these nodes; those of what its heads made; and those of what a head needs from other nodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
from ray._private.internal_api import node_stats  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from lte_ray import LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from tests.support.ray_runs import settings, storage  # noqa: E402
from workers.regression import Regression  # noqa: E402

KIND = {"ray.io/market-type": "spot"}


def created(node: Any) -> int:
    """Bytes of all objects that were ever put or copied into a node's object store."""
    address, port = node.node_ip_address, node.node_manager_port
    return int(node_stats(address, port).store_stats.cumulative_created_bytes)


def main(folder: Path) -> None:
    """Runs once with whole bases on the way down, and once with factors."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2, labels=KIND) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    for way in ("dense", "factors"):
        config = settings(80, eval_every=0, checkpoint_every=0) | {
            "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
            "merge": MergeConfig(merge_iter=10, merge_threads=1, send_down=way),  # type: ignore[arg-type]
        }
        before = created(nodes[0])
        placed = PlacementConfig(cpus_per_head=1.0)
        LTETrainer(Regression(width=256), run_config=storage(folder, way), scaling_config=placed, **config).fit()
        rows = [json.loads(row) for row in (folder / way / "metrics.jsonl").read_text().splitlines()]
        merges = [row for row in rows if row["kind"] == "merge"]
        base = sum(p.numel() for p in Regression(width=256).build_model().parameters()) * 4
        each = sum(merge["bytes_up"] for merge in merges) / 4  # of one head
        needed = base * (1 + len(merges)) if way == "dense" else base + 2 * each
        print(json.dumps({"way": way, "created": created(nodes[0]) - before, "made": 2 * each, "needed": needed}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
