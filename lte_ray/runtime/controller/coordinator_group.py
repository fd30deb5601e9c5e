"""The coordinator and its shards, seen from the driver: they start, are watched and end as one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from lte_ray.engine.hang_detector import STARTING, HangDetector, ProcessHealth
from lte_ray.engine.prepare import Initial
from lte_ray.errors import CoordinatorLost
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.controller.actor_launcher import ActorLauncher
from lte_ray.runtime.coordinator.actor import CoordinatorActor, CoordinatorStatus
from lte_ray.runtime.coordinator.shard_actor import ShardActor
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.draining import node_of_actor
from lte_ray.runtime.ray_errors import PROCESS_DIED, to_lte_error

ANSWER_WAIT = 0.2
"""Seconds that one poll waits for the coordinator's answer."""


class CoordinatorGroup:
    """Starts a coordinator and its shards from a state, as often as recovery asks for it, and watches them.

    Args:
        context, initial, policy: the run's context, its model and its merge policy.
        launcher: starts and ends actors.
        hang_detector: the run's, which knows how long answers take.

    Attributes:
        actor: the coordinator's handle; None before the first begins.
        epoch: how many coordinators there were before this one; -1 before the first.
        policy: the run's merge policy, as each coordinator gets it.
    """

    def __init__(
        self,
        context: RunContext,
        initial: Initial,
        policy: PickledObject,
        launcher: ActorLauncher,
        hang_detector: HangDetector,
    ) -> None:
        self._context, self._initial, self.policy = context, initial, policy
        self._launcher, self._hang_detector = launcher, hang_detector
        self.actor: Any = None
        self.epoch = -1
        self._shards: list[Any] = []
        self._forget_answers()

    def _forget_answers(self) -> None:
        self._health = ProcessHealth()
        self._request: tuple[Any, float] | None = None  # the status request without an answer, and since when
        self._latest: tuple[CoordinatorStatus, float] | None = None  # the newest status, and when it was requested
        self._shard_requests: dict[int, tuple[Any, float]] = {}
        self._answered_shards: set[int] = set()  # until a shard has answered, its silence means little

    def begin(self, state: CoordinatorState) -> None:
        """Starts a coordinator, with its shards if there are any, from this state."""
        plans, count = self._initial.plans, self._context.settings.merge.shards
        calls = max(1000, 3 * len(plans))  # heads that wait must not use up the coordinator's concurrent calls
        numbers = range(count) if count > 1 else ()
        launch, unreserved = self._launcher.launch, self._launcher.unreserved
        spread = {**unreserved(count), "max_concurrency": calls} if numbers else {}
        self._shards = [launch(ShardActor, spread, self._context, plans, number, state) for number in numbers]
        options = {**unreserved(), "max_concurrency": calls}
        self.actor = launch(CoordinatorActor, options, self._context, plans, self.policy, state, self._shards)
        self.epoch = state.epoch

    def stop(self) -> None:
        """Ends what is left of the coordinator and its shards, so that no head gets an answer from them any more."""
        for actor in [self.actor, *self._shards]:
            if actor is not None:
                self._launcher.end(actor)
        self._forget_answers()

    def nodes(self) -> set[str]:
        """Returns the nodes that the coordinator and its shards are on, as far as they are known."""
        nodes = {node_of_actor(actor) for actor in [self.actor, *self._shards]}
        return {node for node in nodes if node is not None}

    def lose_heads(self, next_incarnations: Mapping[int, int], drop: bool) -> Any:
        """Tells the coordinator that processes of heads are gone, for good if `drop`. Returns a reference to its answer."""
        return self.actor.lose.remote(next_incarnations, drop)

    # -- health --------------------------------------------------------------------------------------------------------

    def poll(self, seen: int) -> CoordinatorStatus | None:
        """Returns the coordinator's status if it has answered, with the merges after version `seen`.

        Raises:
            CoordinatorLost: its process died, or hangs.
        """
        now = time.monotonic()
        self._health.begun = self._health.begun or now  # it reserves nothing, so it never waits for a place
        if self._request is None:
            self._request = (self.actor.status.remote(seen), now)
        ref, requested_at = self._request
        if not ray.wait([ref], timeout=ANSWER_WAIT)[0]:
            why = self._hang_detector.hang_reason(self._health, time.monotonic(), requested_at)
            if why:
                raise CoordinatorLost(why)
            return None
        self._request = None
        try:
            status: CoordinatorStatus = ray.get(ref)
        except (*PROCESS_DIED, ray.exceptions.RayTaskError) as error:
            raise to_lte_error(error, "the coordinator") from error
        self._hang_detector.record_answer(
            self._health, time.monotonic(), requested_at, status.version, idle=True, stepped=False, head=False
        )
        self._latest = (status, requested_at)
        return status

    def check_shards(self) -> None:
        """Asks each shard whether it lives.

        Raises:
            CoordinatorLost: a shard's process died, or hangs.
        """
        now, silence = time.monotonic(), self._hang_detector.silence
        for number, shard in enumerate(self._shards):
            ref, since = self._shard_requests.setdefault(number, (shard.alive.remote(), now))
            if ray.wait([ref], timeout=0)[0]:
                del self._shard_requests[number]
                self._answered_shards.add(number)
                try:
                    ray.get(ref)
                except PROCESS_DIED as error:
                    raise CoordinatorLost(f"the process of coordinator shard {number} died") from error
            elif now - since > (silence if number in self._answered_shards else max(silence, STARTING)):
                raise CoordinatorLost(f"the process of coordinator shard {number} hasn't answered for {now - since:.0f} s")

    # -- what its newest status says -----------------------------------------------------------------------------------

    def heads_without_data(self, after: float) -> frozenset[int]:
        """Heads that wait for data, by the newest status; none if it was requested at `after` or before (monotonic time)."""
        if self._latest is None or self._latest[1] <= after:
            return frozenset()
        return frozenset(self._latest[0].without_data)

    @property
    def loss_spike(self) -> tuple[str, int] | None:
        """Why the loss counts as having spiked, and the last version before it did; None if it hasn't."""
        return None if self._latest is None else self._latest[0].spike
