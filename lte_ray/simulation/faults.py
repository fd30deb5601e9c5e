"""Heads that die at random times and come back: what they didn't contribute is lost, and is trained again."""

from __future__ import annotations

from collections.abc import Callable

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import EventResult
from lte_ray.simulation.clock import Clock, RandomEvents
from lte_ray.simulation.coordinator import SimCoordinator
from lte_ray.simulation.delivery import Delivery
from lte_ray.simulation.head import Answer, SimHead


class Faults:
    """Lets heads die, and brings them back as new incarnations.

    Args:
        return_steps: takes back steps that are to be trained again.
        restart: starts the new incarnation on the base that it was sent.
    """

    def __init__(
        self,
        cluster: ClusterModel,
        clock: Clock,
        random_events: RandomEvents,
        coordinator: SimCoordinator,
        delivery: Delivery,
        return_steps: Callable[[SimHead, int], None],
        restart: Callable[[SimHead, Answer], None],
    ) -> None:
        self._cluster, self._clock, self._random_events = cluster, clock, random_events
        self._coordinator, self._delivery = coordinator, delivery
        self._return_steps, self._restart = return_steps, restart
        self._joining: set[int] = set()  # heads that are back and have no base yet
        delivery.connect(self._handle_dead_result, self._start_incarnation)

    def schedule_death(self, head: SimHead) -> None:
        """Schedules the death of a head that has just started, if it is to die."""
        seconds = self._random_events.draw_seconds_to_death(head.number)
        if seconds is not None:
            self._clock.schedule_after(seconds, self._die, head, head.incarnation)

    def _die(self, head: SimHead, incarnation: int) -> None:
        if head.ended or head.incarnation != incarnation:
            return
        now = self._clock.now
        finished = head.steps_finished(now)
        head.steps += finished
        head.lost_steps += head.round_steps + finished
        head.samples += head.trainee.samples
        self._return_steps(head, head.round_steps + head.in_progress[0])
        head.in_progress, head.outstanding, head.inbox = (0, 0.0, 0.0), False, []
        head.incarnation += 1
        head.timeline.enter("dead", now)
        latency, enqueue = self._cluster.latency, self._coordinator.enqueue
        self._clock.schedule_after(latency, enqueue, lambda: self._coordinator.coordinator.lose(head.number))
        self._clock.schedule_after(latency + self._cluster.restart_seconds, enqueue, lambda: self._join(head))

    def _handle_dead_result(self, head: SimHead, answer: Answer) -> None:
        """Handles the result of a contribution that a dead incarnation made."""
        assert answer.result is not None
        if not answer.result.accepted:
            head.lost_steps += head.contributed_steps
            self._return_steps(head, head.contributed_steps)
        if head.number in self._joining:
            self._coordinator.enqueue(lambda: self._join(head))

    def _join(self, head: SimHead) -> EventResult:
        """Asks for the base for a new incarnation; it is sent once no contribution of the predecessor is pending."""
        self._joining.add(head.number)
        coordinator = self._coordinator.coordinator
        if head.number not in coordinator.pending_heads:
            coordinator.join(head.number, head.incarnation, fresh=True)
            position = coordinator.start_head(head.number)
            version, base = coordinator.version, self._coordinator.base
            self._delivery.send_base(Answer(head.number, head.incarnation, None, version, base, position))
        return EventResult((), ())

    def _start_incarnation(self, head: SimHead, answer: Answer) -> bool:
        """Starts a new incarnation if the answer is the base that it waits for; returns whether it is."""
        if head.number not in self._joining:
            return False
        self._joining.discard(head.number)
        self._restart(head, answer)
        return True
