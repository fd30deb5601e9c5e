"""A run on a cluster of labeled nodes; runs as a program with its own cluster.

Usage: python labeled_nodes.py FOLDER. The cluster has a safe node without CPUs, and two spot nodes labeled kind=a and kind=b;
heads are to be on the last. Prints, by the class of actor, the kinds of nodes that such actors were on.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
import ray._private.state  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from lte_ray import LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from lte_ray.errors import ResourceError  # noqa: E402
from tests.support.ray_runs import settings, storage  # noqa: E402
from workers.regression import Regression  # noqa: E402

MARKET = "ray.io/market-type"


def main(folder: Path) -> None:
    """Refuses labels that no node has, then runs."""
    head = {"num_cpus": 0, "include_dashboard": False, "labels": {MARKET: "on-demand", "kind": "safe"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for kind in "ab":
        cluster.add_node(num_cpus=2, labels={MARKET: "spot", "kind": kind})
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    config = settings(40) | {
        "lte": LTEConfig(num_heads=2, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=10, merge_threads=1),
    }

    def fit(name: str, labels: str) -> None:
        placed = PlacementConfig(cpus_per_head=1.0, head_labels=(labels,), placement_strategy="SPREAD")
        LTETrainer(Regression(), run_config=storage(folder, name), scaling_config=placed, **config).fit()

    try:
        fit("none", "kind=c")
    except ResourceError as error:
        print(error)
    assert not (folder / "none").exists()
    fit("r", "kind=b")
    kinds = {node["NodeID"]: node["Labels"]["kind"] for node in ray.nodes()}
    places = defaultdict(set)
    for actor in ray._private.state.actors().values():
        places[actor["ActorClassName"]].add(kinds.get(actor["Address"]["NodeID"], ""))
    print(json.dumps({name: sorted(kinds) for name, kinds in places.items()}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
