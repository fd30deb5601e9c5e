"""Which nodes drain: a cloud, an autoscaler or `ray drain-node` has told Ray that they will be taken away."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

log = logging.getLogger("lte_ray")

_warned: list[Exception] = []


def draining_nodes() -> dict[str, float | None]:
    """Returns the ids of the nodes that drain, with the seconds that are left of each; None if that isn't known.

    Ray has no public function for it; its own Ray Train uses this one.
    """
    try:
        deadlines: Mapping[str, int] = ray._private.state.state.get_draining_nodes() or {}
    except Exception as error:  # one of another release of Ray, or its control service is away for a moment
        if not _warned:
            _warned.append(error)
            log.warning("Ray doesn't say which nodes drain, so heads can't leave those in time: %s", error)
        return {}
    return {node: deadline / 1000 - time.time() if deadline else None for node, deadline in deadlines.items()}


def node_of_bundle(strategy: Any) -> str | None:
    """Returns the id of the node on which the strategy's bundle is reserved; None if there is none."""
    nodes: Mapping[int, str] = placement_group_table(strategy.placement_group).get("bundles_to_node_id", {})
    return nodes.get(strategy.placement_group_bundle_index) or None


def node_of_actor(actor: Any) -> str | None:
    """Returns the id of the node on which an actor runs; None if that isn't known."""
    entry: Mapping[str, Any] = ray._private.state.actors(actor._actor_id.hex()) or {}
    return (entry.get("Address") or {}).get("NodeID") or None


def this_node() -> str:
    """Returns the id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())
