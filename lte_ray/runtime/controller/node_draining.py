"""What the driver does about nodes that drain: machines that will be taken away, such as spot machines with a notice."""

from __future__ import annotations

import logging

from lte_ray.errors import RunError
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot, SlotState
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.draining import draining_nodes, node_of_bundle, this_node

log = logging.getLogger("lte_ray")


class NodeDraining:
    """Has heads leave nodes that drain, before these are gone.

    A head that leaves contributes what it has trained and saves its state; the failure handler has it go on elsewhere. Where
    merges wait for other heads, those are asked to end their rounds. Then all live heads have contributed, so any merge policy
    decides.

    Args:
        state: of the run.
        heads: the processes.
        merges_wait: whether a merge may wait for the contributions of several heads.
    """

    def __init__(self, state: RunState, heads: HeadActorGroup, merges_wait: bool) -> None:
        self._state, self._heads, self._merges_wait = state, heads, merges_wait
        self._noticed: set[str] = set()  # nodes

    def check(self) -> dict[str, float | None]:
        """Looks for nodes that drain, and has heads leave them.

        Returns:
            These nodes, as `draining_nodes` does.

        Raises:
            RunError: the driver's own node drains.
        """
        draining = draining_nodes()
        if not draining:
            self._noticed.clear()
            return draining
        own = this_node()
        if own in draining:
            self._end_run(own, draining[own])
        on_nodes = self._slots_by_node(draining)
        leaving = [slot for slots in on_nodes.values() for slot in slots if slot.has_answered]
        for slot in leaving:
            self._heads.leave(slot)
        if leaving and self._merges_wait:
            self._heads.end_rounds()
        for node in [node for node in on_nodes if node not in self._noticed]:
            heads = [number for slot in on_nodes[node] for number in slot.numbers]
            self._record(node, draining[node], heads)
            when = _when(draining[node])
            log.warning("Node %s will be taken away %s. Heads %s contribute, and move.", node[:12], when, heads)
        self._noticed = (self._noticed | on_nodes.keys()) & draining.keys()
        return draining

    def _slots_by_node(self, draining: dict[str, float | None]) -> dict[str, list[HeadActorSlot]]:
        """By node that drains, the slots there whose process trains, or is to train, and wasn't asked to leave yet."""
        by_node: dict[str, list[HeadActorSlot]] = {}
        for slot in self._heads.slots:
            if slot.state is SlotState.TRAINING and slot.leaves_since is None:
                node = node_of_bundle(slot.strategy)
                if node in draining:
                    by_node.setdefault(str(node), []).append(slot)
        return by_node

    def _record(self, node: str, seconds: float | None, heads: list[int]) -> None:
        left = None if seconds is None else round(max(0.0, seconds), 1)
        self._state.log.record_event("node_drains", node=node, seconds=left, heads=heads)

    def _end_run(self, node: str, seconds: float | None) -> None:
        self._record(node, seconds, [])
        raise RunError(
            f"The driver's own node will be taken away {_when(seconds)}, as Ray was told, and a driver can't move. The run "
            "ends, and its heads save their states. Continue it on another node with --resume."
        )


def _when(seconds: float | None) -> str:
    return "soon" if seconds is None else f"in {max(0.0, seconds):.0f} s"
