"""The heads' share of the cluster: checks that the cluster has it, reserves it, and frees it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, TrainConfig, ray_fields
from lte_ray.config.node_labels import ANY, AUTO, parse_labels
from lte_ray.errors import ConfigError, ResourceError
from lte_ray.layout import Plan
from lte_ray.runtime.draining import draining_nodes, node_of_bundle
from lte_ray.runtime.enclosing_group import find_enclosing
from lte_ray.runtime.nodes import check_labels, describe, live_nodes, total_resources
from lte_ray.runtime.waiting import Lack, Patience
from lte_ray.transfer.groups import EntryGroup, make_groups

MIN_CPUS = 0.25
"""CPUs that an actor of heads gets at least by default."""

LAST_PATIENCE = 1800.0
"""Seconds that a run whose other heads are done waits for a place for the last ones, unless --resource-timeout says another
time."""

PATIENCE = 30.0
"""Seconds to wait for resources that the cluster has, but that others may be using."""

SETTLE = 5
"""Seconds in which Ray reserves bundles for which there is room."""

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


def resolve_run(config: PlacementConfig, lte: LTEConfig, train: TrainConfig, **more: Any) -> Placement:
    """Returns the placement of a run, as `resolve`. Within a placement group that is meant for its heads, from its bundles.

    Args:
        config, lte, train: of the run, as they are given. Ordinary training gets as many CPUs as the heads would.
        more: other fields of `Placement`.

    Raises:
        ResourceError: the cluster or that placement group lacks what is requested.
    """
    heads, processes = lte.num_heads, train.baseline_processes
    places, default_cpus = heads, 0
    if train.baseline:
        config, places, default_cpus = replace(config, heads_per_actor=1), processes, heads // processes
    actors = math.ceil(places / min(config.heads_per_actor, places))
    enclosing = find_enclosing(actors)
    if enclosing is not None and processes > 1:
        raise ResourceError(
            f"--baseline-processes is {processes}, but Ray Train's processes don't use the placement group that this run was "
            "started in. Give that group one bundle only."
        )
    return resolve(enclosing.complete(config) if enclosing else config, places, default_cpus=default_cpus, **more)


def assign_heads(placement: Placement, num_heads: int) -> list[tuple[int, ...]]:
    """Returns the numbers of each actor's heads."""
    return [tuple(range(n, min(n + placement.heads, num_heads))) for n in range(0, num_heads, placement.heads)]


def least_actors(placement: Placement, failure: FailureConfig, actors: int) -> int:
    """Returns how many actors a run may start with if there is no room for all: those of --min-heads, with --exhausted drop."""
    return math.ceil(failure.min_heads / placement.heads) if failure.exhausted == "drop" else actors


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
    """Whether the strategy's bundle is reserved on a node that is alive and doesn't drain, so that an actor in it can start."""
    table = placement_group_table(strategy.placement_group)
    node = table.get("bundles_to_node_id", {}).get(strategy.placement_group_bundle_index)
    return node in [alive.id for alive in live_nodes()] and node not in draining_nodes()


def has_several_nodes() -> bool:
    """Whether the cluster has more than one node."""
    return len(live_nodes()) > 1


def _has_room(placement: Placement) -> bool:
    """Whether a node that suits the placement, and doesn't drain, has a bundle free."""
    nodes = {node.id for node in live_nodes(placement.labels)} - draining_nodes().keys()
    return any(
        all(amount <= free.get(name, 0.0) + 1e-6 for name, amount in placement.bundle.items())
        for node, free in ray._private.state.available_resources_per_node().items()
        if node in nodes
    )


@dataclass
class Reservation:
    """Reserved bundles: one for each actor, and those added while the run is on.

    A node that is lost takes its bundles with it. Ray reserves them again as soon as there is room.

    Attributes:
        placement: what a bundle holds.
        heads_by_actor: the numbers of each actor's heads.
        group: Ray's placement group of the first bundles.
        missing: the numbers of the heads of actors without a bundle: the run starts without them.
        first: the number of the first bundle in the group.
        owned: whether the group is this run's; otherwise it was started in it.
    """

    placement: Placement
    heads_by_actor: list[tuple[int, ...]]
    group: Any
    missing: list[tuple[int, ...]] = field(default_factory=list)
    first: int = 0
    owned: bool = True
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
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        return len({node for bundle, node in nodes.items() if bundle >= self.first})

    def heads_and_strategies(self) -> list[tuple[tuple[int, ...], Any]]:
        """Returns each actor's heads and its scheduling strategy."""
        return [
            (numbers, PlacementGroupSchedulingStrategy(self.group, bundle))
            for bundle, numbers in enumerate(self.heads_by_actor, self.first)
        ]

    def ask_for_missing(self) -> None:
        """Asks Ray for the bundles of the actors that the run starts without; `add_bundle` gives them once there is room."""
        for _ in self.missing:
            group = make_group(self.placement, 1)
            self._added.append(group)
            self._released.append(PlacementGroupSchedulingStrategy(group, 0))

    def add_bundle(self) -> Any:
        """Reserves a bundle for one more actor. Returns its scheduling strategy; None if the cluster has no room now."""
        return self._take_released() or self._add_new()

    def _take_released(self) -> Any:
        for strategy in self._released:
            if is_placed(strategy):
                self._released.remove(strategy)
                return strategy
        return None

    def _add_new(self) -> Any:
        if not _has_room(self.placement):
            return None
        group = make_group(self.placement, 1)
        if not group.wait(1.0):
            remove_placement_group(group)
            return None
        self._added.append(group)
        return PlacementGroupSchedulingStrategy(group, 0)

    def relocate(self, strategy: Any) -> Any:
        """Returns where an actor is to start that has this bundle: in another one if the node of this one is gone or drains.

        It is the same if there is no other one now. Ray reserves it on another node once its node is gone and there is room.
        """
        if is_placed(strategy):
            return strategy
        other = self._take_released()
        if other is None and node_of_bundle(strategy) in draining_nodes():
            other = self._add_new()
        if other is None:
            return strategy
        if strategy.placement_group in self._added:
            self._added.remove(strategy.placement_group)
            remove_placement_group(strategy.placement_group)
        else:  # Ray frees all bundles of a group, or none
            self.release_bundle(strategy)
        return other

    def release_bundle(self, strategy: Any) -> None:
        """Keeps the bundle of an actor that was dropped for the next one. If it is lost, Ray reserves it once there is room."""
        self._released.append(strategy)

    def remove(self) -> None:
        """Frees all bundles, except those of a group that the run was started in."""
        for group in [*([self.group] if self.owned else []), *self._added]:
            remove_placement_group(group)


def make_group(placement: Placement, actors: int) -> Any:
    """Asks Ray for that many bundles: a placement group, for which Ray, and a cluster that grows on demand, look for room."""
    selectors = [dict(placement.labels)] * actors if placement.labels else None
    return placement_group([placement.bundle] * actors, strategy=placement.strategy, bundle_label_selector=selectors)


@contextlib.contextmanager
def reserve(
    placement: Placement,
    heads_by_actor: list[tuple[int, ...]],
    failure: FailureConfig | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> Iterator[Reservation]:
    """Reserves one bundle for each actor, by the numbers of its heads, for the block.

    In a placement group that is meant for them (`find_enclosing`), heads get its bundles. Otherwise Ray asks an autoscaling
    cluster for bundles that have no room.

    Args:
        failure: says with how many heads the run may start if there is no room for all in time; None: with all. The bundles of
            the others are reserved once there is room (`Reservation.add_bundle`).
        show: shows what the run waits for.

    Raises:
        ResourceError: the resources didn't become free in time, or that group has too few.
    """
    enclosing = find_enclosing(len(heads_by_actor))
    if enclosing is not None:
        enclosing.check(placement.bundle, placement.labels)
        reservation = Reservation(placement, heads_by_actor, enclosing.group, first=enclosing.first, owned=False)
        try:
            yield reservation
        finally:
            reservation.remove()
        return
    group = _wait_for_room(placement, len(heads_by_actor), show)
    count = len(heads_by_actor)
    if group is None:
        group, count = _reserve_some(placement, count, least_actors(placement, failure or FailureConfig(), count), show)
    reservation = Reservation(placement, heads_by_actor[:count], group, heads_by_actor[count:])
    try:
        reservation.ask_for_missing()
        yield reservation
    finally:
        reservation.remove()


def _wait_for_room(placement: Placement, actors: int, show: Callable[[str], None]) -> Any:
    """Returns the placement group of all actors' bundles, or None if there was no room for it in time."""
    patience = Patience(max(placement.timeout, PATIENCE), time.monotonic())

    def wait(group: Any) -> bool:
        while not group.wait(max(1, math.ceil(patience.until_word(time.monotonic())))):  # it takes whole seconds
            now = time.monotonic()
            if not patience.left(now):
                return False
            text = patience.say(Lack(placement.bundle, placement.labels, actors), now)
            log.warning("%s", text)
            show(text)
        return True

    return _reserve_if(placement, actors, wait)


def _reserve_if(placement: Placement, actors: int, wait: Callable[[Any], bool]) -> Any:
    """Returns the placement group of that many bundles if it is reserved, as `wait` finds out; else None."""
    group = make_group(placement, actors)
    try:
        if wait(group):
            return group
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)
    return None


def _reserve_some(placement: Placement, actors: int, least: int, show: Callable[[str], None]) -> tuple[Any, int]:
    """Returns the placement group of as many bundles as there is room for now, at least `least`, and their number.

    If there is room for fewer, it waits as long again for the least: an autoscaling cluster that can't have nodes for a whole
    group adds none for a part of it.

    Raises:
        ResourceError: there is no room for them either.
    """
    lack = Lack(placement.bundle, placement.labels, actors)
    for count in range(min(actors - 1, lack.places), least - 1, -1):
        group = _reserve_if(placement, count, lambda group: bool(group.wait(SETTLE)))
        if group is not None:
            log.warning("%s The run starts with %d of %d processes (--exhausted drop).", lack, count, actors)
            return group, count
    if least < actors:
        log.warning("%s The run now waits for %d of %d processes (--exhausted drop, --min-heads).", lack, least, actors)
        group = _wait_for_room(placement, least, show)
        if group is not None:
            return group, least
        lack = Lack(placement.bundle, placement.labels, least)
    waited = max(placement.timeout, PATIENCE) * (1 if least == actors else 2)
    fewer = "--exhausted drop starts with those that have room" if least == actors else f"{least} must have room (--min-heads)"
    raise ResourceError(
        f"There was no room in the cluster for {waited:g} s. {lack} Wait until others have ended, ask for less (--num-heads, "
        f"--cpus-per-head, --gpus-per-head), or raise --resource-timeout; {fewer}."
    )
