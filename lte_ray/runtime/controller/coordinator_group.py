"""The merging side of a run, seen from the driver: coordinator and shards, which live and die together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from lte_ray.engine.hang_detector import STARTING
from lte_ray.engine.prepare import Initial
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.coordinator.actor import CoordinatorActor
from lte_ray.runtime.coordinator.shard_actor import ShardActor
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.ray_errors import PROCESS_DIED

BESIDE = {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}
"""Ray's options of actors that reserve nothing."""

Launch = Callable[..., Any]
"""Starts an actor: its class, Ray's options, its arguments; gives the handle, and sees to its end."""


@dataclass
class CoordinatorGroup:
    """Starts coordinator and shards from a version, again and again if need be.

    Args:
        common, initial, policy: as every run has them.
        launch: starts actors.
        end: ends one.
    """

    common: RunContext
    initial: Initial
    policy: PickledObject
    launch: Launch
    end: Callable[[Any], None]
    coordinator: Any = None
    epoch: int = -1
    _shards: list[Any] = field(default_factory=list)
    _pings: dict[int, tuple[Any, float]] = field(default_factory=dict)  # what isn't answered yet, and since when

    _answered: set[int] = field(default_factory=set)  # shards that have, so that their silence means something

    def begin(self, start: CoordinatorState) -> None:
        """A new coordinator, with shards if there are any, goes on from there."""
        plans, count = self.initial.plans, self.common.settings.merge.shards
        calls = max(1000, 3 * len(plans))  # heads that wait must not fill up the coordinator
        spread = {**BESIDE, "scheduling_strategy": "SPREAD", "max_concurrency": calls}
        numbers = range(count) if count > 1 else ()
        self._shards = [self.launch(ShardActor, spread, self.common, plans, number, start) for number in numbers]
        options = {**BESIDE, "max_concurrency": calls}
        self.coordinator = self.launch(CoordinatorActor, options, self.common, plans, self.policy, start, self._shards)
        self.epoch = start.epoch

    def stop(self) -> None:
        """Ends all of it: what is left of it must not answer anybody."""
        for actor in [self.coordinator, *self._shards]:
            if actor is not None:
                self.end(actor)
        self._pings, self._answered = {}, set()

    def sick_shard(self, silence: float) -> str:
        """Why merging can't go on: a shard's process is gone, or hasn't answered for `silence` seconds; empty if none."""
        now = time.monotonic()
        for number, shard in enumerate(self._shards):
            ref, since = self._pings.setdefault(number, (shard.alive.remote(), now))
            if ray.wait([ref], timeout=0)[0]:
                del self._pings[number]
                self._answered.add(number)
                try:
                    ray.get(ref)
                except PROCESS_DIED:
                    return f"the process of coordinator shard {number} died"
            elif now - since > (silence if number in self._answered else max(silence, STARTING)):
                return f"the process of coordinator shard {number} hasn't answered for {now - since:.0f} s"
        return ""
