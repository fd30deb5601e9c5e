"""The simulation's loop: heads take steps, contribute, get answers, die and come back, all under one virtual clock.

Heads that wait stand still from their contribution to its answer. Heads that don't train on, with at most one contribution
outstanding, and adopt what came between two steps. A head's last contribution is decided before it leaves, and lost if the
policy discards it.

Heads that die and come back: what they didn't contribute is lost, and is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.simulation.clock import Clock, RandomEvents
from lte_ray.simulation.coordinator import SimCoordinator
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.delivery import Delivery
from lte_ray.simulation.head import Answer, SimHead, Timeline, Trainee
from lte_ray.simulation.record import VirtualRun
from lte_ray.simulation.summary import MOST_ROWS, record


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
        chance: RandomEvents,
        desk: SimCoordinator,
        post: Delivery,
        give_back: Callable[[SimHead, int], None],
        restart: Callable[[SimHead, Answer], None],
    ) -> None:
        self._cluster, self._clock, self._chance, self._desk, self._post = cluster, clock, chance, desk, post
        self._give_back, self._restart = give_back, restart
        self._asking: set[int] = set()  # heads that are back and have no base yet
        post.watch(self._undelivered, self._returns)

    def threaten(self, seat: SimHead) -> None:
        """Draws when the head, which has just started, dies."""
        in_seconds = self._chance.dies_in(seat.number)
        if in_seconds is not None:
            self._clock.after(in_seconds, self._die, seat, seat.epoch)

    def _die(self, seat: SimHead, epoch: int) -> None:
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

    def _undelivered(self, seat: SimHead, answer: Answer) -> None:
        """A contribution of an incarnation that died is decided."""
        assert answer.verdict is not None
        if not answer.verdict.accepted:
            seat.lost += seat.offered
            self._give_back(seat, seat.offered)
        if seat.number in self._asking:
            self._desk.put(lambda: self._join(seat))

    def _join(self, seat: SimHead) -> StepResult:
        """The new incarnation asks for the base; it gets it as soon as nothing of its predecessor's is pending."""
        self._asking.add(seat.number)
        if seat.number not in self._desk.coordinator.pending_heads:
            coordinator = self._desk.coordinator
            coordinator.join(seat.number, seat.epoch, fresh=True)
            standing = coordinator.start_head(seat.number)
            self._post.whole(Answer(seat.number, seat.epoch, None, coordinator.version, self._desk.base, standing))
        return StepResult((), ())

    def _returns(self, seat: SimHead, answer: Answer) -> bool:
        """Takes the base that a new incarnation starts from."""
        if seat.number not in self._asking:
            return False
        self._asking.discard(seat.number)
        self._restart(seat, answer)
        return True


class Simulation:
    """One run on a cluster that is thought up. Deterministic: the same arguments give the same record.

    Args:
        settings: the run's; `merge` decides when heads contribute and whether they wait.
        cluster: how fast everything is.
        sizes: bytes and costs.
        clock: also the coordinator's.
        coordinator: the engine's own, at version 0.
        make: gives head n's trainee of incarnation k.
        evaluate: judges a base; None where there is no model.
    """

    def __init__(
        self,
        settings: Settings,
        cluster: ClusterModel,
        sizes: CostModel,
        clock: Clock,
        coordinator: Coordinator,
        make: Callable[[int, int], Trainee],
        evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    ) -> None:
        self._merge, self._cluster, self._make = settings.merge, cluster, make
        self._clock, self._coordinator = clock, coordinator
        steps, heads = settings.train.steps, range(settings.lte.num_heads)
        self._shared = is_shared(settings)
        self._pool = steps * len(heads)
        self._whole_rounds = self._merge.wait and not self._shared  # nothing can happen to a head in the middle of one
        self._chance = RandomEvents(cluster, settings.train.seed, len(heads))
        self.seats = [SimHead(n, make(n, 0), cluster.speed(n), steps, Timeline("train", draw=n < MOST_ROWS)) for n in heads]
        self._ended = 0
        self.desk = SimCoordinator(clock, coordinator, cluster, sizes, evaluate)
        self.post = Delivery(settings, cluster, sizes, clock, self.desk, self.seats, self._take)
        self._faults = Faults(cluster, clock, self._chance, self.desk, self.post, self._give_back, self._restart)
        self.desk.connect(self.post.down, self.post.moved)

    def run(self) -> VirtualRun:
        """Runs to the end.

        Raises:
            PolicyError: as `Coordinator`, and where the policy still waits when nothing can happen any more.
            WorkerFailed: the worker's code raised.
        """
        for seat in self.seats:
            self._start(seat, 0, self.desk.base)
        self._clock.run(until=lambda: self._ended == len(self.seats) and self.desk.idle)
        if self._ended < len(self.seats):
            waiting = [seat.number for seat in self.seats if not seat.ended]
            raise PolicyError(
                f"The merge policy {type(self._coordinator.policy).__name__} waits "
                f"{self._coordinator.waiting_for or 'for something'}, but nothing can happen any more: head(s) {waiting[:8]} "
                "wait for its decision."
            )
        return record(self.seats, self.desk, self.post, clock=self._clock)

    # -- a head's rounds -----------------------------------------------------------------------------------------------

    def _start(self, seat: SimHead, version: int, base: Tensor) -> None:
        seat.head.start(version, base)
        self._begin(seat)

    def _begin(self, seat: SimHead) -> None:
        self.post.adopted(seat)
        self._plan(seat)
        self._faults.threaten(seat)
        self._go_on(seat, seat.epoch)

    def _plan(self, seat: SimHead) -> None:
        """How many steps until the next contribution, and how slow they will be."""
        seat.since, seat.spent = 0, 0.0
        seat.planned = self._steps(seat)
        seat.slow = self._chance.slowness(seat.number)

    def _steps(self, seat: SimHead) -> int:
        """The steps of a round, by the speeds that the coordinator has heard of."""
        if self._merge.match_speed or self._merge.merge_every:
            return self._coordinator.step_rates.round_steps(seat.number, self._coordinator.live)
        return self._merge.merge_iter

    def _go_on(self, seat: SimHead, epoch: int) -> None:
        """The head is between two steps: contributes, ends, or takes the next."""
        if seat.epoch != epoch or seat.ended:
            return
        over = self._pool <= 0 if self._shared else seat.left <= 0
        if not seat.outstanding and seat.since and (over or seat.since >= seat.planned):
            self._contribute(seat)
            if over or self._merge.wait:
                seat.time.enter("send", self._clock.now)
                return
        if over and seat.outstanding:
            seat.time.enter("wait", self._clock.now)
        elif over:
            self._leave(seat)
        else:
            self._take_steps(seat, max(1, min(seat.planned - seat.since, seat.left)) if self._whole_rounds else 1)

    def _take_steps(self, seat: SimHead, steps: int) -> None:
        seat.time.enter("train", self._clock.now)
        seat.left -= steps
        self._pool -= steps
        seconds = self._chance.seconds(seat.number, steps, seat.slow)
        seat.spent += seconds
        seat.under_way = (steps, self._clock.now, seconds)
        self._clock.after(seconds, self._stepped, seat, seat.epoch)

    def _stepped(self, seat: SimHead, epoch: int) -> None:
        """The steps that were under way have ended; what came meanwhile is adopted."""
        if seat.epoch != epoch or seat.ended:
            return
        steps, seat.under_way = seat.under_way[0], (0, 0.0, 0.0)
        seat.head.train(steps)
        seat.since += steps
        seat.steps += steps
        if seat.inbox:
            answers, seat.inbox = seat.inbox, []
            for answer in answers:
                self._adopt(seat, answer)
            self._stand_still(seat)
        else:
            self._go_on(seat, epoch)

    def _contribute(self, seat: SimHead) -> None:
        contribution = replace(seat.head.contribute(), seconds=seat.spent)
        seat.outstanding, seat.offered = True, seat.since
        seat.contributions += 1
        self.post.up(seat, contribution)
        self._plan(seat)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _take(self, seat: SimHead, answer: Answer) -> None:
        if seat.doing == "train" and seat.under_way[1] == self._clock.now and not self._cluster.rebase_seconds:
            self._adopt(seat, answer)  # it came between two steps: of this one nothing is done yet
        elif seat.doing == "train":
            seat.inbox.append(answer)
        else:
            self._adopt(seat, answer)
            if seat.outstanding:
                seat.time.enter("wait", self._clock.now)
            else:
                self._stand_still(seat)

    def _adopt(self, seat: SimHead, answer: Answer) -> None:
        news = answer.version > seat.head.version
        seat.head.adopt(answer.verdict, answer.version, answer.base if news else None)
        if answer.verdict is not None:
            seat.outstanding = False
            seat.planned = self._steps(seat)
            if answer.verdict.quarantined:
                self._leave(seat)
        if news:
            seat.time.mark(self._clock.now)
        self.post.adopted(seat)

    def _stand_still(self, seat: SimHead) -> None:
        """For as long as adopting takes."""
        if self._cluster.rebase_seconds:
            seat.time.enter("fetch", self._clock.now)
            self._clock.after(self._cluster.rebase_seconds, self._go_on, seat, seat.epoch)
        else:
            self._go_on(seat, seat.epoch)

    def _leave(self, seat: SimHead) -> None:
        seat.ended, seat.ended_at = True, self._clock.now
        self._ended += 1
        self._pool += seat.under_way[0]  # what one that is quarantined has just begun is for others
        seat.time.enter("idle", self._clock.now)
        self._clock.after(self._cluster.latency, self.desk.put, lambda: self._coordinator.leave(seat.number))

    # -- faults --------------------------------------------------------------------------------------------------------

    def _give_back(self, seat: SimHead, steps: int) -> None:
        """Steps that died with a head are to be taken again."""
        seat.left += steps
        self._pool += steps

    def _restart(self, seat: SimHead, answer: Answer) -> None:
        assert answer.standing is not None
        seat.head = self._make(seat.number, seat.epoch)
        seat.head.rejoin(answer.standing, answer.version, answer.base)
        seat.samples -= seat.head.samples  # its predecessor's, which were counted when that died
        self._begin(seat)
