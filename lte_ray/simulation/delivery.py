"""Between heads and coordinator: what is sent, how many bytes it has, and who is sent a newer base unasked.

Which heads are too far behind, found without looking at all of them.
"""

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
    """Keeps each head's version while nothing is on its way to it.

    Args:
        most: versions that a head may be behind.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, int]] = []
        self._at: dict[int, int] = {}

    def at(self, head: int, version: int) -> None:
        """The head has adopted this version, and nothing more is on its way."""
        self._at[head] = version
        heapq.heappush(self._heap, (version, head))

    def sent(self, head: int) -> None:
        """Something is on its way to the head."""
        self._at.pop(head, None)

    def behind(self, version: int) -> list[int]:
        """The heads that are more than `most` versions behind this one. They count as sent to from now on."""
        found = []
        while self._heap and version - self._heap[0][0] > self._most:
            known, head = heapq.heappop(self._heap)
            if self._at.get(head) == known:
                del self._at[head]
                found.append(head)
        return found


class Delivery:
    """Carries contributions up and answers down.

    Args:
        seats: all heads'.
        take: what a head does with an answer that has arrived.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: ClusterModel,
        sizes: CostModel,
        clock: Clock,
        desk: SimCoordinator,
        seats: list[SimHead],
        take: Callable[[SimHead, Answer], None],
    ) -> None:
        self.network = Network(cluster, len(seats), settings.merge.shards)
        self._sizes, self._clock, self._desk, self._seats, self._take = sizes, clock, desk, seats, take
        self._undelivered: Callable[[SimHead, Answer], None] = lambda seat, answer: None
        self._returns: Callable[[SimHead, Answer], bool] = lambda seat, answer: False
        self._lagging = None if settings.merge.wait else StalenessQueue(settings.merge.max_lag)
        self._sent = [0] * len(seats)  # the version that each head was sent last

    def watch(self, undelivered: Callable[[SimHead, Answer], None], returns: Callable[[SimHead, Answer], bool]) -> None:
        """Says who is told of verdicts on what a dead incarnation contributed, and who may take an answer before the head."""
        self._undelivered, self._returns = undelivered, returns

    def up(self, seat: SimHead, contribution: Contribution) -> None:
        """The head hands over a contribution."""
        arrival = self.network.up(self._clock.now, seat.number, self._sizes.up(seat.number))
        self._clock.at(arrival, self._arrive, seat, seat.epoch, contribution)

    def _arrive(self, seat: SimHead, epoch: int, contribution: Contribution) -> None:
        if seat.epoch == epoch and seat.doing == "send":
            seat.time.enter("wait", self._clock.now)
        self._desk.receive(contribution)

    def down(self, answer: Answer) -> None:
        """The coordinator sends a head what it lacks of the newest version."""
        seat, verdict = self._seats[answer.head], answer.verdict
        if verdict is not None and not verdict.accepted:
            seat.refused += 1
        if verdict is not None and answer.incarnation != seat.epoch:
            self._undelivered(seat, answer)
            return
        dense, factors, before = 0, 0, self._sent[answer.head]
        if answer.version > before:
            own = verdict is not None and verdict.accepted
            dense, factors = self._sizes.down(self._desk.merged[answer.version] - self._desk.merged[before] - own)
        self._carry(seat, answer, dense, factors)

    def whole(self, answer: Answer) -> None:
        """The coordinator sends a head the whole base."""
        self._carry(self._seats[answer.head], answer, self._sizes.base, 0)

    def _carry(self, seat: SimHead, answer: Answer, dense: int, factors: int) -> None:
        self._sent[seat.number] = answer.version
        if seat.doing != "train":
            seat.time.enter("fetch", self._clock.now)
        if self._lagging is not None:
            self._lagging.sent(seat.number)
        arrival = self.network.down(self._clock.now, seat.number, dense, factors)
        self._clock.at(arrival, self._hand_over, seat, seat.epoch, answer)

    def _hand_over(self, seat: SimHead, epoch: int, answer: Answer) -> None:
        if seat.epoch == epoch and not seat.ended and not self._returns(seat, answer):
            self._take(seat, answer)

    def adopted(self, seat: SimHead) -> None:
        """The head has adopted what it was sent; more is sent if it is too far behind again."""
        if self._lagging is not None:
            self._lagging.at(seat.number, seat.head.version)
            self.moved()

    def moved(self) -> None:
        """Heads that are too far behind the newest version, and that nothing is on its way to, are sent it."""
        if self._lagging is not None:
            version = len(self._desk.merged) - 1
            for number in self._lagging.behind(version):
                seat = self._seats[number]
                if not seat.ended and seat.doing != "dead":
                    self.down(Answer(number, seat.epoch, None, version, self._desk.base))
