"""The simulation's loop: heads take steps, contribute, and get answers under one virtual clock.

Heads that wait stand still from their contribution to its answer. Heads that don't wait train on, with at most one
contribution outstanding, and adopt what arrived between two steps. A head leaves once its last contribution is decided; that
contribution is lost if the policy discards it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.simulation.clock import Clock, RandomEvents
from lte_ray.simulation.coordinator import SimCoordinator
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.delivery import Delivery
from lte_ray.simulation.faults import Faults
from lte_ray.simulation.head import Answer, SimHead, Timeline, Trainee
from lte_ray.simulation.record import SimulationRecord

MAX_ROWS = 16
"""Heads whose time can be drawn."""


class Simulation:
    """One run on a modeled cluster. Deterministic: the same arguments give the same record.

    Args:
        settings: the run's; `merge` decides when heads contribute and whether they wait.
        cluster: how fast everything is.
        costs: bytes and costs.
        clock: also the coordinator's.
        coordinator: the engine's own, at version 0.
        make_trainee: makes the trainee of a head and incarnation.
        evaluate: evaluates a base; None if there is no model.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: ClusterModel,
        costs: CostModel,
        clock: Clock,
        coordinator: Coordinator,
        make_trainee: Callable[[int, int], Trainee],
        evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    ) -> None:
        self._merge, self._cluster, self._make_trainee = settings.merge, cluster, make_trainee
        self._clock, self._engine = clock, coordinator
        self._steps = steps = settings.train.steps
        numbers = range(settings.lte.num_heads)
        self._shares_steps = is_shared(settings)
        self._shared_steps_left = steps * len(numbers)
        self._takes_full_rounds = self._merge.wait and not self._shares_steps  # nothing can happen to a head in a round
        self._random_events = RandomEvents(cluster, settings.train.seed, len(numbers))
        self._heads = [
            SimHead(n, make_trainee(n, 0), cluster.speed(n), steps, Timeline("train", draw=n < MAX_ROWS)) for n in numbers
        ]
        self._ended = 0
        self._coordinator = SimCoordinator(clock, coordinator, cluster, costs, evaluate)
        self._delivery = Delivery(settings, cluster, costs, clock, self._coordinator, self._heads, self._handle_answer)
        self._faults = Faults(
            cluster, clock, self._random_events, self._coordinator, self._delivery, self._return_steps, self._restart
        )
        self._coordinator.connect(self._delivery.send_answer, self._delivery.send_to_stale_heads)

    def run(self) -> SimulationRecord:
        """Runs to the end.

        Raises:
            PolicyError: as `Coordinator`, and if the policy still waits when nothing can happen any more.
            WorkerFailed: the worker's code raised.
        """
        for head in self._heads:
            head.trainee.start(0, self._coordinator.base)
            self._begin_training(head)
        self._clock.run(until=lambda: self._ended == len(self._heads) and self._coordinator.idle)
        if self._ended < len(self._heads):
            waiting = [head.number for head in self._heads if not head.ended]
            raise PolicyError(
                f"The merge policy {type(self._engine.policy).__name__} waits "
                f"{self._engine.waiting_for or 'for something'}, but nothing can happen any more: head(s) {waiting[:8]} "
                "wait for its decision."
            )
        return self._build_record()

    def _build_record(self) -> SimulationRecord:
        now, coordinator, network = self._clock.now, self._coordinator, self._delivery.network
        coordinator.timeline.enter("end", now)
        bytes_up, bytes_down = network.traffic()
        drawn = [head.timeline for head in self._heads[:MAX_ROWS]]
        rows = [timeline.to_row(f"head {number}") for number, timeline in enumerate(drawn)]
        seconds = max(now, 1e-300)
        return SimulationRecord(
            seconds=max(head.ended_at for head in self._heads),
            heads=tuple(head.to_record(bytes_up[head.number], bytes_down[head.number]) for head in self._heads),
            merges=tuple(coordinator.merges),
            lags=dict(coordinator.lags),
            arrivals=coordinator.arrivals,
            coordinator_busy=coordinator.busy_seconds / seconds,
            link_in_busy=network.inward.busy / seconds,
            link_out_busy=network.outward.busy / seconds,
            rows=(*rows, coordinator.timeline.to_row("coordinator")),
            rows_cut=any(timeline.truncated for timeline in (*drawn, coordinator.timeline)),
            events=self._clock.events,
        )

    # -- a head's rounds -----------------------------------------------------------------------------------------------

    def _begin_training(self, head: SimHead) -> None:
        self._delivery.record_adopted(head)
        self._plan_round(head)
        self._faults.schedule_death(head)
        self._continue(head, head.incarnation)

    def _plan_round(self, head: SimHead) -> None:
        """Decides how many steps the head takes until its next contribution, and how slow they are."""
        head.round_steps, head.round_seconds = 0, 0.0
        head.planned_steps = self._plan_steps(head)
        head.slowdown = self._random_events.draw_slowdown(head.number)

    def _plan_steps(self, head: SimHead) -> int:
        """The steps of a round, by the speeds that the coordinator has measured."""
        progress = self._engine.step_budget.progress if self._shares_steps else (self._steps - head.steps_left) / self._steps
        if self._merge.match_speed or self._merge.merge_every:
            return self._engine.step_rates.round_steps(head.number, self._engine.live, progress)
        return self._merge.steps_between(progress)

    def _continue(self, head: SimHead, incarnation: int) -> None:
        """Between two steps: the head contributes, leaves, or takes the next step."""
        if head.incarnation != incarnation or head.ended:
            return
        done = self._shared_steps_left <= 0 if self._shares_steps else head.steps_left <= 0
        if not head.outstanding and head.round_steps and (done or head.round_steps >= head.planned_steps):
            self._contribute(head)
            if done or self._merge.wait:
                head.timeline.enter("send", self._clock.now)
                return
        if done and head.outstanding:
            head.timeline.enter("wait", self._clock.now)
        elif done:
            self._leave(head)
        else:
            planned = min(head.planned_steps - head.round_steps, head.steps_left)
            self._begin_steps(head, max(1, planned) if self._takes_full_rounds else 1)

    def _begin_steps(self, head: SimHead, steps: int) -> None:
        head.timeline.enter("train", self._clock.now)
        head.steps_left -= steps
        self._shared_steps_left -= steps
        seconds = self._random_events.draw_seconds(head.number, steps, head.slowdown)
        head.round_seconds += seconds
        head.in_progress = (steps, self._clock.now, seconds)
        self._clock.schedule_after(seconds, self._finish_steps, head, head.incarnation)

    def _finish_steps(self, head: SimHead, incarnation: int) -> None:
        """Trains the steps that were in progress, and adopts what arrived meanwhile."""
        if head.incarnation != incarnation or head.ended:
            return
        steps, head.in_progress = head.in_progress[0], (0, 0.0, 0.0)
        head.trainee.train(steps)
        head.round_steps += steps
        head.steps += steps
        if head.inbox:
            answers, head.inbox = head.inbox, []
            for answer in answers:
                self._adopt(head, answer)
            self._pause_for_rebase(head)
        else:
            self._continue(head, incarnation)

    def _contribute(self, head: SimHead) -> None:
        contribution = replace(head.trainee.contribute(), seconds=head.round_seconds)
        head.outstanding, head.contributed_steps = True, head.round_steps
        head.contributions += 1
        self._delivery.send_contribution(head, contribution)
        self._plan_round(head)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _handle_answer(self, head: SimHead, answer: Answer) -> None:
        if head.activity == "train" and head.in_progress[1] == self._clock.now and not self._cluster.rebase_seconds:
            self._adopt(head, answer)  # it arrived between two steps: nothing of this one is done yet
        elif head.activity == "train":
            head.inbox.append(answer)
        else:
            self._adopt(head, answer)
            if head.outstanding:
                head.timeline.enter("wait", self._clock.now)
            else:
                self._pause_for_rebase(head)

    def _adopt(self, head: SimHead, answer: Answer) -> None:
        is_newer = answer.version > head.trainee.version
        head.trainee.adopt(answer.result, answer.version, answer.base if is_newer else None)
        if answer.result is not None:
            head.outstanding = False
            head.planned_steps = self._plan_steps(head)
            if answer.result.quarantined:
                self._leave(head)
        if is_newer:
            head.timeline.mark_adoption(self._clock.now)
        self._delivery.record_adopted(head)

    def _pause_for_rebase(self, head: SimHead) -> None:
        """Continues after the time that adopting takes."""
        if self._cluster.rebase_seconds:
            head.timeline.enter("fetch", self._clock.now)
            self._clock.schedule_after(self._cluster.rebase_seconds, self._continue, head, head.incarnation)
        else:
            self._continue(head, head.incarnation)

    def _leave(self, head: SimHead) -> None:
        head.ended, head.ended_at = True, self._clock.now
        self._ended += 1
        self._shared_steps_left += head.in_progress[0]  # others take the step that a quarantined head has just begun
        head.timeline.enter("idle", self._clock.now)
        self._clock.schedule_after(self._cluster.latency, self._coordinator.enqueue, lambda: self._engine.leave(head.number))

    # -- faults --------------------------------------------------------------------------------------------------------

    def _return_steps(self, head: SimHead, steps: int) -> None:
        """Takes back steps that were lost when a head died: they are to be taken again."""
        head.steps_left += steps
        self._shared_steps_left += steps

    def _restart(self, head: SimHead, answer: Answer) -> None:
        assert answer.position is not None
        head.trainee = self._make_trainee(head.number, head.incarnation)
        head.trainee.rejoin(answer.position, answer.version, answer.base)
        head.samples -= head.trainee.samples  # its predecessor's, which were counted when that died
        self._begin_training(head)
