"""The heads' share of the cluster: checks that the cluster has it, reserves it, and frees it."""

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

from lte_ray.config import MergeConfig, PlacementConfig, ray_fields
from lte_ray.config.node_labels import ANY, AUTO, parse_labels
from lte_ray.errors import ConfigError, ResourceError
from lte_ray.layout import Plan
from lte_ray.runtime.nodes import check_labels, describe, live_nodes, total_resources
from lte_ray.transfer.groups import EntryGroup, make_groups

MIN_CPUS = 0.25
"""CPUs that an actor of heads gets at least by default."""

LAST_PATIENCE = 1800.0
"""Seconds that a run whose other heads are done waits for a place for the last ones, unless --resource-timeout says another
time."""

PATIENCE = 30.0
"""Seconds to wait for resources that the cluster has, but that others may be using."""

WARN_EVERY = 10
"""Seconds between two warnings that the start waits for resources."""

log = logging.getLogger("lte_ray")


@dataclass(frozen=True)
class Placement:
    """What each actor of heads reserves.

    Attributes:
        cpus, gpus: of one actor.
        heads: that one actor hosts.
        timeout: seconds to wait for resources that a growing cluster may add.
        strategy: Ray's placement strategy, which says how actors are spread over nodes.
        other: further resources of one actor, by their names in Ray.
        labels: Ray's label selector of the nodes that actors of heads may be on.
        coordinator_labels: where the coordinator, its shards and the evaluator may be, as the setting says it.
        gpu_memory: part of its GPU's memory that one actor may use for tensors; 1: no limit.
    """

    cpus: float
    gpus: float
    heads: int = 1
    timeout: float = 0.0
    strategy: str = "PACK"
    other: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    coordinator_labels: tuple[str, ...] = (AUTO,)
    gpu_memory: float = 1.0

    @property
    def bundle(self) -> dict[str, float]:
        """One actor's resources, by their names in Ray."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.other}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


def from_scaling_config(scaling: Any, num_heads: int) -> tuple[PlacementConfig, dict[str, Any]]:
    """Returns what Ray's ScalingConfig says: our config of actors, and the other fields of `Placement`.

    Ray's workers are actors of heads. If there are fewer than heads, each hosts several (virtual heads). One worker, Ray's
    default, means one per head.

    Raises:
        ConfigError: with `num_workers` actors they can't all, but the last, host equally many heads; or a field asks for what a
            run can't do.
    """
    if isinstance(scaling, PlacementConfig) or scaling is None:
        return scaling or PlacementConfig(), {}
    ray_fields.check_followed(scaling, ray_fields.SCALING)
    if not isinstance(scaling.num_workers, int) or scaling.num_workers < 1:
        raise ConfigError(
            f"ScalingConfig(num_workers={scaling.num_workers}): the number of heads is fixed, so give one number, at least 1."
        )
    workers = num_heads if scaling.num_workers == 1 else scaling.num_workers
    each = math.ceil(num_heads / workers)
    if math.ceil(num_heads / each) != workers:
        raise ConfigError(
            f"ScalingConfig(num_workers={workers}) contradicts LTEConfig(num_heads={num_heads}): all workers but the last must "
            f"host equally many heads. Leave num_workers out for one head each, or give {math.ceil(num_heads / each)}."
        )
    other = {k: float(v) for k, v in (scaling.resources_per_worker or {}).items()}
    gpus = other.pop("GPU", 1.0 if scaling.use_gpu else 0.0)
    if gpus > 1:
        raise ConfigError(
            f"ScalingConfig(resources_per_worker={scaling.resources_per_worker}): a process of heads computes on one GPU, so "
            "the others would idle. Give at most 1 GPU, and raise num_workers up to the number of heads."
        )
    if scaling.accelerator_type:
        other[f"accelerator_type:{scaling.accelerator_type}"] = 0.001
    labels = getattr(scaling, "label_selector", None) or {}
    if not isinstance(labels, Mapping):
        raise ConfigError(
            f"ScalingConfig(label_selector={labels}): heads are restarted anywhere in the same nodes, so give one label "
            "selector for all, a dict."
        )
    config = PlacementConfig(
        heads_per_actor=each,
        cpus_per_head=other.pop("CPU", None),
        gpus_per_head=gpus,
        placement_strategy=scaling.placement_strategy,
        head_labels=labels,  # type: ignore[arg-type]  # a mapping becomes a tuple
    )
    return config, {"other": other}


def resolve(config: PlacementConfig, num_heads: int, *, default_cpus: int = 0, **more: Any) -> Placement:
    """Returns the placement, with defaults for what `config` leaves open, from what the connected cluster has.

    Args:
        config: resources per head or actor.
        num_heads: of the run.
        default_cpus: CPUs of each actor, as far as a node has them, where `config` leaves them open; 0: one for each head.
        more: other fields of `Placement`.

    Raises:
        ResourceError: the cluster lacks what is requested, and gets no time to grow; or no node has the labels.
        ConfigError: a setting is for GPUs, and the heads get none.
    """
    labels = parse_labels("head_labels", config.head_labels)
    has, largest = _available(config, labels)
    heads = min(config.heads_per_actor, num_heads)
    actors = math.ceil(num_heads / heads)
    gpus = config.gpus_per_head
    if gpus is None:
        gpus = 1.0 if has.get("GPU", 0) >= actors else 0.0
        if not gpus and has.get("GPU", 0):
            log.warning("%s", _unused_gpus(has["GPU"], actors))
    if config.gpu_memory_share is not None and not gpus:
        raise ConfigError(
            f"--gpu-memory-share is {config.gpu_memory_share}, but the heads train on CPUs: the cluster doesn't have a GPU for "
            "each. Leave it out, or give --gpus-per-head."
        )
    cpus = config.cpus_per_head
    if cpus is None:
        share = has.get("CPU", 0) / actors
        wanted = min(default_cpus, largest) if default_cpus else heads
        cpus = float(min(wanted, int(share))) if share >= 1 else max(MIN_CPUS, int(share * 100) / 100)
    placement = Placement(
        cpus,
        gpus,
        heads,
        config.resource_timeout,
        config.placement_strategy,
        labels=labels,
        coordinator_labels=config.coordinator_labels,
        gpu_memory=config.gpu_memory_share or gpus or 1.0,
        **more,
    )
    short = {k: v * actors for k, v in placement.bundle.items() if v * actors > has.get(k, 0) + 1e-6}
    if short and not placement.timeout:
        raise ResourceError(_lack_of_resources(placement, actors, short, has))
    return placement


def _available(config: PlacementConfig, labels: Mapping[str, str]) -> tuple[Mapping[str, float], int]:
    """Returns what the nodes that heads may be on have together, and the CPUs of the one that has most.

    Raises:
        ResourceError: no node has the labels that the settings ask for.
    """
    nodes = live_nodes()
    if config.coordinator_labels not in ((AUTO,), (ANY,)):
        check_labels("--coordinator-labels", parse_labels("coordinator_labels", config.coordinator_labels), nodes)
    if labels:
        check_labels("--head-labels", labels, nodes, config.resource_timeout)
        nodes = live_nodes(labels)
    return total_resources(nodes), max((int(node.resources.get("CPU", 0)) for node in nodes), default=0)


def assign_heads(placement: Placement, num_heads: int) -> list[tuple[int, ...]]:
    """Returns the numbers of each actor's heads."""
    return [tuple(range(n, min(n + placement.heads, num_heads))) for n in range(0, num_heads, placement.heads)]


def _unused_gpus(gpus: float, actors: int) -> str:
    each = math.ceil(actors / gpus)  # on one GPU: a process can't have parts of two
    return (
        f"The cluster has {gpus:g} GPU for {actors} processes of heads, so all of them train on CPUs. To use it, give each a "
        f"part of one (--gpus-per-head {math.floor(100 / each) / 100:g}) or several heads a process (--heads-per-actor {each})."
    )


def _lack_of_resources(placement: Placement, actors: int, short: dict[str, float], has: Mapping[str, float]) -> str:
    total = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
    each = ", ".join(f"{amount:g} {name}" for name, amount in placement.bundle.items())
    available = ", ".join(f"{has.get(name, 0):g} {name}" for name in short)
    fitting = min(int(has.get(k, 0) / placement.bundle[k] + 1e-6) for k in short)
    flags = " or ".join(f"--{k.lower()}s-per-head" for k in short if k in ("CPU", "GPU")) or "the resources per head"
    heads = f"--num-heads to at most {fitting * placement.heads}" if fitting else "another kind of resource"
    who = f"{actors} heads" if placement.heads == 1 else f"{actors} actors of {placement.heads} heads"
    place = f"nodes with {describe(placement.labels)} have" if placement.labels else "the cluster has"
    return (
        f"{who} ask for {total} ({each} each), but {place} {available}. Lower {heads}, lower {flags}, let several "
        "heads share an actor (--heads-per-actor), or add nodes (a cluster that grows on demand needs --resource-timeout "
        "SECONDS)."
    )


def transfer_groups(merge: MergeConfig, plans: Sequence[Plan], nodes: int, redoable: bool = True) -> tuple[EntryGroup, ...]:
    """Returns the groups in which layers travel.

    On one node the base goes through shared memory: it is copied, not sent. That is cheaper for the heads than redoing merges
    from factors, so "auto" chooses it.

    Args:
        merge: the settings.
        plans: of all heads.
        nodes: on which heads are.
        redoable: whether heads can redo the policy's merges from factors; if not, "auto" sends the base, too.
    """
    dense = merge.send_down == "auto" and (nodes == 1 or not redoable)
    return make_groups(plans, replace(merge, send_down="dense") if dense else merge)


def is_placed(strategy: PlacementGroupSchedulingStrategy) -> bool:
    """Whether the strategy's bundle is reserved on a node that is alive, so that an actor in it can start."""
    table = placement_group_table(strategy.placement_group)
    if table["state"] == "CREATED":
        return True
    node = table.get("bundles_to_node_id", {}).get(strategy.placement_group_bundle_index)
    return node in [alive.id for alive in live_nodes()]


def has_several_nodes() -> bool:
    """Whether the cluster has more than one node."""
    return len(live_nodes()) > 1


@dataclass
class Reservation:
    """Reserved bundles: one for each actor, and those added while the run is on.

    A node that is lost takes its bundles with it. Ray reserves them again as soon as there is room.

    Attributes:
        placement: what a bundle holds.
        heads_by_actor: the numbers of each actor's heads.
        group: Ray's placement group of the first bundles.
    """

    placement: Placement
    heads_by_actor: list[tuple[int, ...]]
    group: Any
    _added: list[Any] = field(default_factory=list)
    _released: list[Any] = field(default_factory=list)

    @property
    def patience(self) -> float:
        """Seconds to wait for a place in the cluster."""
        return max(self.placement.timeout, PATIENCE)

    @property
    def last_patience(self) -> float:
        """Seconds to wait for a place for heads whose run is done but for them."""
        return max(self.placement.timeout or LAST_PATIENCE, PATIENCE)

    @property
    def nodes(self) -> int:
        """The number of nodes that the first bundles are on."""
        return len(set(placement_group_table(self.group)["bundles_to_node_id"].values()))

    def heads_and_strategies(self) -> list[tuple[tuple[int, ...], Any]]:
        """Returns each actor's heads and its scheduling strategy."""
        return [(numbers, PlacementGroupSchedulingStrategy(self.group, i)) for i, numbers in enumerate(self.heads_by_actor)]

    def add_bundle(self) -> Any:
        """Reserves a bundle for one more actor. Returns its scheduling strategy; None if the cluster has no room now."""
        for strategy in self._released:
            if is_placed(strategy):
                self._released.remove(strategy)
                return strategy
        free = ray.available_resources()
        if any(amount > free.get(name, 0.0) + 1e-6 for name, amount in self.placement.bundle.items()):
            return None
        group = _reserve(self.placement, 1)
        if not group.wait(1.0):
            remove_placement_group(group)
            return None
        self._added.append(group)
        return PlacementGroupSchedulingStrategy(group, 0)

    def release_bundle(self, strategy: Any) -> None:
        """Keeps the bundle of an actor that was dropped for the next one. If it is lost, Ray reserves it once there is room."""
        self._released.append(strategy)

    def remove(self) -> None:
        """Frees all bundles."""
        for group in [self.group, *self._added]:
            remove_placement_group(group)


def _reserve(placement: Placement, actors: int) -> Any:
    """Asks Ray for that many bundles: a placement group, for which Ray, and a cluster that grows on demand, look for room."""
    selectors = [dict(placement.labels)] * actors if placement.labels else None
    return placement_group([placement.bundle] * actors, strategy=placement.strategy, bundle_label_selector=selectors)


@contextlib.contextmanager
def reserve(placement: Placement, heads_by_actor: list[tuple[int, ...]]) -> Iterator[Reservation]:
    """Reserves one bundle for each actor, by the numbers of its heads, for the block.

    Raises:
        ResourceError: the resources didn't become free in time.
    """
    actors = len(heads_by_actor)
    group = _reserve(placement, actors)
    reservation = Reservation(placement, heads_by_actor, group)
    try:
        end = time.monotonic() + reservation.patience
        while not group.wait(max(1, min(WARN_EVERY, math.ceil(end - time.monotonic())))):  # it takes whole seconds
            available = ray.available_resources()
            free = ", ".join(f"{available.get(name, 0):g} {name}" for name in placement.bundle)
            left = end - time.monotonic()
            if left > 0:
                log.warning(
                    "%d actors of %s each wait for room; free now: %s. %.0f s more.", actors, placement.bundle, free, left
                )
                continue
            raise ResourceError(
                f"{actors} actors of {placement.bundle} each couldn't be placed within {reservation.patience:g} s; free now: "
                f"{free}. Others use the cluster, or no node is large enough for a head. Wait, ask for less, or give "
                "--resource-timeout."
            )
        yield reservation
    finally:
        reservation.remove()
