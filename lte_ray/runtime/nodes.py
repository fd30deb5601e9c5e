"""The nodes of the connected cluster: what they have and are labeled, and which of them suit a process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from lte_ray.config.node_labels import ANY, AUTO, matches, parse_labels
from lte_ray.errors import ResourceError

OFF_SPOT = {"ray.io/market-type": "!in(spot,preemptible)"}
"""Chooses the nodes that aren't labeled as ones that may be taken back at any time."""

OF_ONE_NODE = "ray.io/node-id"
"""Ray's label that each node has a value of its own for."""

SHOWN = 12
"""Labels that a message lists at most."""

log = logging.getLogger("lte_ray")


@dataclass(frozen=True)
class Node:
    """A node that is alive: its id in Ray, its labels, and all its resources by their names in Ray."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


def live_nodes(selector: Mapping[str, str] | None = None) -> list[Node]:
    """Returns the nodes that are alive, or those of them that a label selector chooses."""
    nodes = [Node(n["NodeID"], n.get("Labels") or {}, n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return having(nodes, selector or {})


def having(nodes: Iterable[Node], selector: Mapping[str, str]) -> list[Node]:
    """Returns the nodes that a label selector chooses."""
    return [node for node in nodes if matches(selector, node.labels)]


def total_resources(nodes: Iterable[Node]) -> dict[str, float]:
    """Returns what these nodes have together, by the names of resources in Ray."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node.resources)
    return dict(total)


def describe(selector: Mapping[str, str]) -> str:
    """A label selector as settings write it."""
    return " ".join(f"{key}={value}" for key, value in selector.items())


def describe_labels(nodes: Sequence[Node]) -> str:
    """Names the labels of nodes, with the number of nodes that have each."""
    count = Counter(f"{k}={v}" for node in nodes for k, v in node.labels.items() if k != OF_ONE_NODE)
    if not count:
        return "The cluster's nodes have no labels"
    shown = [f"{label} ({number} node{'s' * (number > 1)})" for label, number in sorted(count.items())]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"Labels of the cluster's nodes: {', '.join(shown[:SHOWN])}{more}"


def check_labels(setting: str, selector: Mapping[str, str], nodes: Sequence[Node], timeout: float = 0.0) -> None:
    """Checks that a label selector chooses a node of the cluster, or that one may still come.

    Args:
        setting: the flag that gives the labels.
        nodes: all of the cluster's.
        timeout: seconds in which a growing cluster may add such a node.

    Raises:
        ResourceError: no node has the labels, and none may come.
    """
    if having(nodes, selector):
        return
    lack = f"No node matches {setting} {describe(selector)}. {describe_labels(nodes)}."
    if timeout:
        log.warning("%s The run waits %.0f s for such nodes (--resource-timeout).", lack, timeout)
        return
    raise ResourceError(
        f"{lack} Correct {setting}, start such nodes (ray start --labels KEY=VALUE), or give --resource-timeout if the cluster "
        "grows on demand."
    )


def coordinator_selector(labels: tuple[str, ...], nodes: Sequence[Node], processes: int = 1) -> dict[str, str]:
    """Returns the label selector of processes that reserve nothing: the coordinator, its shards, the evaluator.

    Called when such processes start, also in place of lost ones: if the nodes that were asked for are gone by then, others
    that aren't spot nodes are better than none.

    Args:
        labels: as the setting gives them.
        nodes: the cluster's.
        processes: that are to be on different nodes. If there are too few nodes that aren't spot nodes, all nodes are used:
            links of several nodes are what shards are for.
    """
    if labels == (ANY,):
        return {}
    if labels != (AUTO,):
        asked = parse_labels("coordinator_labels", labels)
        if having(nodes, asked):
            return asked
        log.warning("No node matches --coordinator-labels %s any more, so another one is used.", describe(asked))
    safe = having(nodes, OFF_SPOT)
    return OFF_SPOT if processes <= len(safe) < len(nodes) else {}


def free_by_node(nodes: Iterable[Node]) -> list[dict[str, float]]:
    """Returns what is free on each of these nodes, by the names of resources in Ray."""
    import ray._private.state  # public functions say only what the cluster has in sum

    free = ray._private.state.available_resources_per_node()
    return [free.get(node.id, {}) for node in nodes]


def free_gpus(selector: Mapping[str, str]) -> float:
    """Returns the free GPUs of the node that has most of them among those that a label selector chooses."""
    return max((free.get("GPU", 0.0) for free in free_by_node(live_nodes(selector))), default=0.0)
