"""Messages between heads and the coordinator: their bytes and arrival, and bases sent to heads that are too far behind."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.settings import Settings
from lte_ray.messages import Contribution
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.coordinator import SimCoordinator
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.head import Answer, SimHead
from lte_ray.simulation.network import Network


class StalenessQueue:
    """Finds the heads that are too far behind, without a search through all of them.

    It holds the version of each head to which nothing is being sent.

    Args:
        max_lag: versions by which a head may be behind.
    """

    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._heap: list[tuple[int, int]] = []
        self._versions: dict[int, int] = {}

    def record_adopted(self, head: int, version: int) -> None:
        """Records that the head has adopted this version, and that nothing else is being sent to it."""
        self._versions[head] = version
        heapq.heappush(self._heap, (version, head))

    def record_sent(self, head: int) -> None:
        """Records that something is being sent to the head."""
        self._versions.pop(head, None)

    def pop_stale(self, version: int) -> list[int]:
        """The heads that are more than `max_lag` versions behind `version`; from now on they count as sent to."""
        stale = []
        while self._heap and version - self._heap[0][0] > self._max_lag:
            known, head = heapq.heappop(self._heap)
            if self._versions.get(head) == known:
                del self._versions[head]
                stale.append(head)
        return stale


class Delivery:
    """Carries contributions up and answers down.

    Args:
        heads: all heads.
        on_arrival: what a head does with an answer that has arrived.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: ClusterModel,
        costs: CostModel,
        clock: Clock,
        coordinator: SimCoordinator,
        heads: list[SimHead],
        on_arrival: Callable[[SimHead, Answer], None],
    ) -> None:
        self.network = Network(cluster, len(heads), settings.merge.shards)
        self._costs, self._clock, self._coordinator, self._heads = costs, clock, coordinator, heads
        self._on_arrival = on_arrival
        self._on_dead_result: Callable[[SimHead, Answer], None] = lambda head, answer: None
        self._intercept: Callable[[SimHead, Answer], bool] = lambda head, answer: False
        self._staleness = None if settings.merge.wait else StalenessQueue(settings.max_lag)
        self._sent_versions = [0] * len(heads)  # the version that each head was sent last

    def connect(self, on_dead_result: Callable[[SimHead, Answer], None], intercept: Callable[[SimHead, Answer], bool]) -> None:
        """Sets what handles results of dead incarnations' contributions, and what may take an answer before the head does."""
        self._on_dead_result, self._intercept = on_dead_result, intercept

    def send_contribution(self, head: SimHead, contribution: Contribution) -> None:
        """Sends a head's contribution to the coordinator."""
        arrival = self.network.send_up(self._clock.now, head.number, self._costs.contribution_bytes(head.number))
        self._clock.schedule_at(arrival, self._arrive, head, head.incarnation, contribution)

    def _arrive(self, head: SimHead, incarnation: int, contribution: Contribution) -> None:
        if head.incarnation == incarnation and head.activity == "send":
            head.timeline.enter("wait", self._clock.now)
        self._coordinator.receive(contribution)

    def send_answer(self, answer: Answer) -> None:
        """Sends a head what it lacks of the newest version."""
        head, result = self._heads[answer.head], answer.result
        if result is not None and not result.accepted:
            head.refused += 1
        if result is not None and answer.incarnation != head.incarnation:
            self._on_dead_result(head, answer)
            return
        dense, factors, before = 0, 0, self._sent_versions[answer.head]
        if answer.version > before:
            merged = self._coordinator.merged_contributions
            accepted = result is not None and result.accepted
            others = merged[answer.version] - merged[before] - accepted
            dense, factors = self._costs.update_bytes(others, answer.version - before)
        self._send_down(head, answer, dense, factors)

    def send_base(self, answer: Answer) -> None:
        """Sends a head the complete base."""
        self._send_down(self._heads[answer.head], answer, self._costs.base_bytes, 0)

    def _send_down(self, head: SimHead, answer: Answer, dense: int, factors: int) -> None:
        self._sent_versions[head.number] = answer.version
        if head.activity != "train":
            head.timeline.enter("fetch", self._clock.now)
        if self._staleness is not None:
            self._staleness.record_sent(head.number)
        arrival = self.network.send_down(self._clock.now, head.number, dense, factors)
        self._clock.schedule_at(arrival, self._hand_over, head, head.incarnation, answer)

    def _hand_over(self, head: SimHead, incarnation: int, answer: Answer) -> None:
        if head.incarnation == incarnation and not head.ended and not self._intercept(head, answer):
            self._on_arrival(head, answer)

    def record_adopted(self, head: SimHead) -> None:
        """Records that the head has adopted what it was sent; it is sent more if it is too far behind again."""
        if self._staleness is not None:
            self._staleness.record_adopted(head.number, head.trainee.version)
            self.send_to_stale_heads()

    def send_to_stale_heads(self) -> None:
        """Sends the newest version to the heads that are too far behind it and to which nothing is being sent."""
        if self._staleness is not None:
            version = len(self._coordinator.merged_contributions) - 1
            for number in self._staleness.pop_stale(version):
                head = self._heads[number]
                if not head.ended and head.activity != "dead":
                    self.send_answer(Answer(number, head.incarnation, None, version, self._coordinator.base))
