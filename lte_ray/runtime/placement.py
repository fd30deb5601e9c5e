"""What the heads get of the cluster: checks that it is there, reserves it, and gives it back."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lte_ray.config import MergeConfig, PlacementConfig
from lte_ray.errors import ConfigError, ResourceError
from lte_ray.layout import Plan
from lte_ray.transfer.groups import EntryGroup, make_groups

LEAST_SHARE = 0.25
"""CPUs that a head gets at least when heads share cores by default."""

PATIENCE = 30.0
"""Seconds to wait for resources that the cluster has but others may be using."""

SAY = 10
"""Seconds after which a start says that it waits for resources, again and again."""

log = logging.getLogger("lte_ray")


@dataclass(frozen=True)
class Placement:
    """What one actor reserves for its `heads`, and how actors are spread (Ray's placement strategy)."""

    cpus: float
    gpus: float
    heads: int = 1
    timeout: float = 0.0
    strategy: str = "PACK"
    other: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """Ray's resources of one actor."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.other}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


def from_scaling_config(scaling: Any, num_heads: int) -> tuple[PlacementConfig, dict[str, Any]]:
    """Reads Ray's ScalingConfig: the actors and what each gets, and the other fields of `Placement`.

    Ray's workers are our actors: fewer than heads host several each (virtual heads). One, Ray's default, means one a head.

    Raises:
        ConfigError: the heads can't be shared out evenly enough over `num_workers` actors.
    """
    if isinstance(scaling, PlacementConfig) or scaling is None:
        return scaling or PlacementConfig(), {}
    if not isinstance(scaling.num_workers, int):
        raise ConfigError(f"ScalingConfig(num_workers={scaling.num_workers}): heads are a fixed number here; give one number.")
    workers = num_heads if scaling.num_workers == 1 else scaling.num_workers
    each = math.ceil(num_heads / workers)
    if math.ceil(num_heads / each) != workers:
        raise ConfigError(
            f"ScalingConfig(num_workers={workers}) contradicts LTEConfig(num_heads={num_heads}): each hosts one head, or "
            f"as many as all others but the last. Leave num_workers out for one each, or give {math.ceil(num_heads / each)}."
        )
    other = {k: float(v) for k, v in (scaling.resources_per_worker or {}).items()}
    gpus = other.pop("GPU", 1.0 if scaling.use_gpu else 0.0)
    if scaling.accelerator_type:
        other[f"accelerator_type:{scaling.accelerator_type}"] = 0.001
    return PlacementConfig(heads_per_actor=each, cpus_per_head=other.pop("CPU", None), gpus_per_head=gpus), {
        "other": other,
        "strategy": scaling.placement_strategy,
    }


def resolve(config: PlacementConfig, num_heads: int, **more: Any) -> Placement:
    """Fills in what `config` leaves to us, from what the connected cluster has.

    Raises:
        ResourceError: the cluster lacks what was asked, and isn't given time to grow.
    """
    has = ray.cluster_resources()
    heads = min(config.heads_per_actor, num_heads)
    actors = math.ceil(num_heads / heads)
    gpus = config.gpus_per_head
    if gpus is None:
        gpus = 1.0 if has.get("GPU", 0) >= actors else 0.0
        if not gpus and has.get("GPU", 0):
            log.warning("%s", _unused(has["GPU"], actors))
    cpus = config.cpus_per_head
    if cpus is None:
        share = has.get("CPU", 0) / actors
        cpus = float(min(heads, int(share))) if share >= 1 else max(LEAST_SHARE, int(share * 100) / 100)
    placement = Placement(cpus, gpus, heads, config.resource_timeout, **more)
    short = {k: v * actors for k, v in placement.bundle.items() if v * actors > has.get(k, 0) + 1e-6}
    if short and not placement.timeout:
        raise ResourceError(_lacks(placement, actors, short, has))
    return placement


def assign_heads(placement: Placement, num_heads: int) -> list[tuple[int, ...]]:
    """The numbers of each actor's heads."""
    return [tuple(range(n, min(n + placement.heads, num_heads))) for n in range(0, num_heads, placement.heads)]


def _unused(gpus: float, actors: int) -> str:
    each = math.ceil(actors / gpus)  # on one GPU: a process can't have parts of two
    return (
        f"The cluster has {gpus:g} GPU for {actors} processes of heads, so all of them train on CPUs. To use it, give each a "
        f"part of one (--gpus-per-head {math.floor(100 / each) / 100:g}) or several heads a process (--heads-per-actor {each})."
    )


def _lacks(placement: Placement, actors: int, short: dict[str, float], has: Mapping[str, float]) -> str:
    wants = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
    each = ", ".join(f"{amount:g} {name}" for name, amount in placement.bundle.items())
    there = ", ".join(f"{has.get(name, 0):g} {name}" for name in short)
    fit = min(int(has.get(k, 0) / placement.bundle[k] + 1e-6) for k in short)
    flags = " or ".join(f"--{k.lower()}s-per-head" for k in short if k in ("CPU", "GPU")) or "the resources per head"
    heads = f"--num-heads to at most {fit * placement.heads}" if fit else "another kind of resource"
    who = f"{actors} heads" if placement.heads == 1 else f"{actors} actors of {placement.heads} heads"
    return (
        f"{who} ask for {wants} ({each} each), but the cluster has {there}. Lower {heads}, lower {flags}, let several heads "
        "share an actor (--heads-per-actor), or add nodes (a cluster that grows on demand needs --resource-timeout SECONDS)."
    )


def transfer_groups(merge: MergeConfig, plans: Sequence[Plan], nodes: int, redoable: bool = True) -> tuple[EntryGroup, ...]:
    """The groups in which layers travel.

    On one node shared memory carries the base, which is then copied and not sent. That is cheaper for the heads than redoing
    merges from factors, so "auto" takes it. So it does where the policy's merges can't be redone from factors.
    """
    dense = merge.send_down == "auto" and (nodes == 1 or not redoable)
    return make_groups(plans, replace(merge, send_down="dense") if dense else merge)


def is_placed(strategy: PlacementGroupSchedulingStrategy) -> bool:
    """Whether its bundle is reserved on a node that is there, so that an actor in it can start."""
    table = placement_group_table(strategy.placement_group)
    if table["state"] == "CREATED":
        return True
    node = table.get("bundles_to_node_id", {}).get(strategy.placement_group_bundle_index)
    return node in _nodes()


def has_several_nodes() -> bool:
    """Whether the cluster has more than one node."""
    return len(_nodes()) > 1


def _nodes() -> list[str]:
    """The ids of the nodes that are there."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


@dataclass
class Reservation:
    """Reserved bundles, one for each actor, and those that are added while the run is on.

    A node that is lost takes its bundles with it; Ray reserves them anew as soon as there is room.
    """

    placement: Placement
    heads_by_actor: list[tuple[int, ...]]
    group: Any
    _added: list[Any] = field(default_factory=list)
    _spare: list[Any] = field(default_factory=list)

    @property
    def patience(self) -> float:
        """Seconds to wait for a place."""
        return max(self.placement.timeout, PATIENCE)

    @property
    def nodes(self) -> int:
        """On how many nodes they lie."""
        return len(set(placement_group_table(self.group)["bundles_to_node_id"].values()))

    def slots(self) -> list[tuple[tuple[int, ...], Any]]:
        """Each actor's heads, and its scheduling strategy."""
        return [(numbers, PlacementGroupSchedulingStrategy(self.group, i)) for i, numbers in enumerate(self.heads_by_actor)]

    def add_bundle(self) -> Any:
        """The scheduling strategy of one more actor; None if the cluster has no room now."""
        for strategy in self._spare:
            if is_placed(strategy):
                self._spare.remove(strategy)
                return strategy
        free = ray.available_resources()
        if any(amount > free.get(name, 0.0) + 1e-6 for name, amount in self.placement.bundle.items()):
            return None
        group = placement_group([self.placement.bundle])
        if not group.wait(1.0):
            remove_placement_group(group)
            return None
        self._added.append(group)
        return PlacementGroupSchedulingStrategy(group, 0)

    def release_bundle(self, strategy: Any) -> None:
        """The actor there is given up: its bundle, which Ray reserves as soon as there is room, is for the next one."""
        self._spare.append(strategy)

    def remove(self) -> None:
        """Gives all of it back."""
        for group in [self.group, *self._added]:
            remove_placement_group(group)


@contextlib.contextmanager
def reserve(placement: Placement, hosted: list[tuple[int, ...]]) -> Iterator[Reservation]:
    """Reserves one bundle for each actor of `hosted` (head numbers), for the block.

    Raises:
        ResourceError: the resources didn't become free in time.
    """
    actors = len(hosted)
    group = placement_group([placement.bundle] * actors, strategy=placement.strategy)
    places = Reservation(placement, hosted, group)
    try:
        end = time.monotonic() + places.patience
        while not group.wait(max(1, min(SAY, math.ceil(end - time.monotonic())))):  # it takes whole seconds
            free = ray.available_resources()
            shown = ", ".join(f"{free.get(name, 0):g} {name}" for name in placement.bundle)
            left = end - time.monotonic()
            if left > 0:
                log.warning(
                    "%d actors of %s each wait for room; free now: %s. %.0f s more.", actors, placement.bundle, shown, left
                )
                continue
            raise ResourceError(
                f"{actors} actors of {placement.bundle} each couldn't be placed within {places.patience:g} s; free now: "
                f"{shown}. Others use the cluster, or no node is large enough for a head. Wait, ask for less, or give "
                "--resource-timeout."
            )
        yield places
    finally:
        places.remove()
