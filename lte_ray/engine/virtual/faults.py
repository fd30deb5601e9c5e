"""Heads that die and come back: what they didn't contribute is lost, and is trained again."""

from __future__ import annotations

from collections.abc import Callable

from lte_ray.config.cluster import ClusterModel
from lte_ray.engine.coordinator import Outcome
from lte_ray.engine.virtual.chance import Chance
from lte_ray.engine.virtual.desk import Desk
from lte_ray.engine.virtual.events import Clock
from lte_ray.engine.virtual.post import Post
from lte_ray.engine.virtual.seat import Answer, Seat


class Faults:
    """Lets heads die at random times, and brings them back as new incarnations.

    Args:
        give_back: takes steps that are to be trained again.
        restart: starts the new incarnation on the base that it was sent.
    """

    def __init__(
        self,
        cluster: ClusterModel,
        clock: Clock,
        chance: Chance,
        desk: Desk,
        post: Post,
        give_back: Callable[[Seat, int], None],
        restart: Callable[[Seat, Answer], None],
    ) -> None:
        self._cluster, self._clock, self._chance, self._desk, self._post = cluster, clock, chance, desk, post
        self._give_back, self._restart = give_back, restart
        self._asking: set[int] = set()  # heads that are back and have no base yet
        post.watch(self._undelivered, self._returns)

    def threaten(self, seat: Seat) -> None:
        """Draws when the head, which has just started, dies."""
        in_seconds = self._chance.dies_in(seat.number)
        if in_seconds is not None:
            self._clock.after(in_seconds, self._die, seat, seat.epoch)

    def _die(self, seat: Seat, epoch: int) -> None:
        if seat.ended or seat.epoch != epoch:
            return
        now = self._clock.now
        finished = seat.finished_at(now)
        seat.steps += finished
        seat.lost += seat.since + finished
        seat.samples += seat.head.samples
        self._give_back(seat, seat.since + seat.under_way[0])
        seat.under_way, seat.outstanding, seat.inbox = (0, 0.0, 0.0), False, []
        seat.epoch += 1
        seat.time.enter("dead", now)
        latency = self._cluster.latency
        self._clock.after(latency, self._desk.put, lambda: self._desk.coordinator.lose(seat.number))
        self._clock.after(latency + self._cluster.restart_seconds, self._desk.put, lambda: self._join(seat))

    def _undelivered(self, seat: Seat, answer: Answer) -> None:
        """A contribution of an incarnation that died is decided."""
        assert answer.verdict is not None
        if not answer.verdict.accepted:
            seat.lost += seat.offered
            self._give_back(seat, seat.offered)
        if seat.number in self._asking:
            self._desk.put(lambda: self._join(seat))

    def _join(self, seat: Seat) -> Outcome:
        """The new incarnation asks for the base; it gets it as soon as nothing of its predecessor's is pending."""
        self._asking.add(seat.number)
        if seat.number not in self._desk.coordinator.pending:
            coordinator = self._desk.coordinator
            coordinator.join(seat.number, seat.epoch, fresh=True)
            standing = coordinator.start(seat.number)
            self._post.whole(Answer(seat.number, seat.epoch, None, coordinator.version, self._desk.base, standing))
        return Outcome((), ())

    def _returns(self, seat: Seat, answer: Answer) -> bool:
        """Takes the base that a new incarnation starts from."""
        if seat.number not in self._asking:
            return False
        self._asking.discard(seat.number)
        self._restart(seat, answer)
        return True
