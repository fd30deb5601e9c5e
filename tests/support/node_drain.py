"""A run on several nodes, of which those with heads drain, as spot machines do that will be taken away; a program of its own.

Usage: python node_drain.py FOLDER CASE [TIMES]. TIMES says how often a node drains, one after the other.
Prints the result's metrics and the notices; exits with the run's exit code, 0 if it finished.
CASES says how a run merges and what drains. A node that drains is taken away once its heads have left, or after `NOTICE`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.core.generated import autoscaler_pb2  # noqa: E402

from lte_ray import FailureConfig, LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from lte_ray.errors import LTEError  # noqa: E402
from lte_ray.runtime import placement  # noqa: E402
from lte_ray.runtime.controller import failure_handling  # noqa: E402
from tests.support.node_loss import SlowRegression  # noqa: E402
from tests.support.ray_runs import settings, storage  # noqa: E402

NOTICE = 30.0
"""Seconds that a node has left when it begins to drain."""


@dataclass(frozen=True)
class Case:
    """How a run merges, and what happens to its nodes.

    Attributes:
        merge: settings.
        spare: whether a node has room for the heads that leave.
        heads_per_actor: of the run.
        drains: the nodes that drain: "heads" (one with heads), "coordinator", "driver", or "new" (one that has just joined).
        steps: of each head.
        grows: by how many heads the run grows when a node joins.
    """

    merge: dict[str, Any] = field(default_factory=dict)
    spare: bool = True
    heads_per_actor: int = 1
    drains: str = "heads"
    grows: int = 0
    steps: int = 400


CASES = {
    "barrier": Case(),
    "quorum": Case({"when": "quorum", "quorum": 2, "wait": False}),
    "arrival": Case({"when": "arrival", "wait": False}),
    "shards": Case({"shards": 2, "policy": "nesterov"}),
    "virtual": Case(heads_per_actor=2),
    "no room": Case(spare=False),
    "coordinator": Case({"policy": "nesterov"}, drains="coordinator"),
    "driver": Case(drains="driver"),
    "grow": Case({"when": "arrival", "wait": False}, spare=False, drains="new", grows=2, steps=1200),
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of the run's metrics."""
    path = folder / "r" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count(folder: Path, event: str) -> int:
    """Counts the heads of events of this kind, or the merges."""
    if event == "merge":
        return sum(row["kind"] == "merge" for row in rows(folder))
    return sum(len(row.get("heads", [0])) for row in rows(folder) if row.get("event") == event)


def actor_nodes(class_name: str) -> Counter[str]:
    """Counts the live actors of this class on each node."""
    actors = ray._private.state.actors().values()
    return Counter(a["Address"]["NodeID"] for a in actors if a["ActorClassName"] == class_name and a["State"] == "ALIVE")


def drain(address: str, node: str, seconds: float) -> float:
    """Gives Ray notice that the node will be taken away; returns when (Unix time)."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    at = time.time()
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(node, reason, "spot", int((at + seconds) * 1000))
    assert accepted, why
    return at


def main(folder: Path, name: str, times: int = 1) -> int:
    """Runs the case; returns the run's exit code."""
    case = CASES[name]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {node.node_id: node for node in [cluster.add_node(num_cpus=2) for _ in range(3 if case.spare else 2)]}
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    placement.PATIENCE, failure_handling.RELOCATE_EVERY, failure_handling.GROW_EVERY = 5.0, 1.0, 1.0
    config = settings(case.steps if times == 1 else 800 * times) | {
        "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(**{"merge_iter": 40, "merge_threads": 1, **case.merge}),
    }
    placed = PlacementConfig(cpus_per_head=1.0, heads_per_actor=case.heads_per_actor)
    failure = FailureConfig(max_heads=4 + case.grows)
    trainer = LTETrainer(SlowRegression(), run_config=storage(folder, "r"), scaling_config=placed, failure=failure, **config)
    results: list[Any] = []
    errors: list[LTEError] = []

    def fit() -> None:
        try:
            results.append(trainer.fit().metrics)
        except LTEError as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()

    def wait_until(event: str, number: int, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while count(folder, event) < number and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.05)

    notices = []
    for time_of in range(times):
        merges, moved = count(folder, "merge"), count(folder, "head_moves")
        wait_until("merge", merges + 3)
        kind = "CoordinatorActor" if case.drains == "coordinator" else "HeadActor"
        node = ray.get_runtime_context().get_node_id() if case.drains == "driver" else min(actor_nodes(kind).keys() & nodes)
        if case.drains == "new":
            joined = cluster.add_node(num_cpus=2)
            node, nodes[joined.node_id] = joined.node_id, joined
            while thread.is_alive() and not {"4", "5"} <= {head for row in rows(folder) for head in row.get("held", {})}:
                time.sleep(0.5)
        heads = actor_nodes("HeadActor")[node] * case.heads_per_actor
        notices.append({"at": drain(cluster.address, node, NOTICE), "node": node})
        if case.drains == "driver":
            break
        wait_until("head_moves", moved + heads, NOTICE)
        if not case.spare and not case.grows:
            wait_until("waits_for_place", 1, NOTICE)
        cluster.remove_node(nodes.pop(node), allow_graceful=False)
        if (not case.spare and not case.grows) or time_of + 1 < times:
            new = cluster.add_node(num_cpus=2)
            nodes[new.node_id] = new
    thread.join(timeout=600)
    metrics = {name: results[0][name] for name in ("step", "samples", "version")} if results else {}
    print(json.dumps({**metrics, "notices": notices, "errors": [str(error) for error in errors]}), flush=True)
    ray.shutdown()
    cluster.shutdown()
    return errors[0].exit_code if errors else 0 if results else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1))
