"""The coordinator's process under the virtual clock: one message after another, each takes its time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
from lte_ray.errors import PolicyError
from lte_ray.messages import Contribution, MergeRecord
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.head import Answer, Timeline
from lte_ray.simulation.record import MergeRow

MOST_TICKS = 10_000
"""How often in a row a policy may ask to be asked again while nothing else happens."""

Message = Callable[[], StepResult]


class SimCoordinator:
    """Drives the engine's coordinator, and keeps count of what it merged.

    Args:
        evaluate: judges a base, for policies that try one; None where there is no model.
    """

    def __init__(
        self,
        clock: Clock,
        coordinator: Coordinator,
        cluster: ClusterModel,
        sizes: CostModel,
        evaluate: Callable[[Tensor], Mapping[str, float]] | None,
    ) -> None:
        self.coordinator, self.merges, self.lags = coordinator, list[MergeRow](), Counter[int]()
        self.merged = [0]  # contributions in all, by version
        self.arrivals = 0
        self.worked = 0.0  # seconds of messages and merges
        self.time = Timeline("idle", draw=True)
        self.base = coordinator.base.clone()
        self._clock, self._cluster, self._sizes = clock, cluster, sizes
        self._evaluate = evaluate
        self._deliver: Callable[[Answer], None] = lambda answer: None
        self._moved: Callable[[], None] = lambda: None
        self._incarnation: dict[int, int] = {}  # of each head's newest contribution
        self._backlog: deque[Message] = deque()
        self._busy = self._judging = False
        self._wake: float | None = None
        self._ticks = 0

    def connect(self, deliver: Callable[[Answer], None], moved: Callable[[], None]) -> None:
        """Says who takes answers at the moment they are sent, and who is told of every merge after its answers."""
        self._deliver, self._moved = deliver, moved

    @property
    def idle(self) -> bool:
        """Whether nothing is being done or waits to be."""
        return not self._busy and not self._backlog and not self._judging

    def receive(self, contribution: Contribution) -> None:
        """A contribution has arrived."""
        self.arrivals += 1
        self.put(lambda: self._receive(contribution))

    def put(self, message: Message) -> None:
        """Something has arrived: what to ask of the coordinator in its turn."""
        self._ticks = 0
        self._backlog.append(message)
        if not self._busy:
            self._next()

    def _receive(self, contribution: Contribution) -> StepResult:
        self._incarnation[contribution.head] = contribution.incarnation
        return self.coordinator.receive(contribution, contribution.buffer)

    def _next(self) -> None:
        outcome = self._backlog.popleft()()
        if outcome.merges:
            self.base = self.coordinator.base.clone()  # the coordinator goes on writing to its own
        cost = self._cluster.message_seconds
        merging = sum(self._sizes.merge_seconds(self._cluster, len(merge.heads)) for merge in outcome.merges)
        self.worked += cost + merging
        self._busy = True
        self.time.enter("merge" if outcome.merges else "message", self._clock.now)
        if self._sizes.dense:  # else nobody waits for the base: it is brought up to date beside
            cost += merging
        version = self.coordinator.version
        answers = [Answer(v.head, self._incarnation[v.head], v, version, self.base) for v in outcome.results]
        self._clock.after(cost, self._done, answers, outcome.merges)
        self._look_after()

    def _done(self, answers: list[Answer], merges: tuple[MergeRecord, ...]) -> None:
        self.time.enter("idle", self._clock.now)
        for merge in merges:
            self._note(merge)
        for answer in answers:
            self._deliver(answer)
        self._busy = False
        if merges:
            self._moved()
        if self._backlog and not self._busy:
            self._next()

    def _note(self, merge: MergeRecord) -> None:
        self.merged.append(self.merged[-1] + len(merge.heads))
        lags = list(merge.lags.values())
        self.lags.update(lags)
        loss = sum(merge.losses.values()) / len(merge.losses)
        self.merges.append(
            MergeRow(
                version=merge.version,
                at=self._clock.now,
                contributions=len(lags),
                steps=merge.steps,
                samples=merge.samples,
                loss=loss,
                mean_lag=sum(lags) / len(lags),
                max_lag=max(lags),
            )
        )

    def _look_after(self) -> None:
        """What the coordinator wants beside messages: an evaluation, or to be asked again."""
        candidate = self.coordinator.candidate
        if candidate is not None and not self._judging:
            if self._evaluate is None:
                raise PolicyError(
                    f"The merge policy {type(self.coordinator.policy).__name__} evaluates what it merges, which a simulation "
                    "that only keeps time can't: give a WORKER, without --time-only."
                )
            self._judging = True
            self._clock.after(self._cluster.evaluate_seconds, self._judge, self._evaluate(candidate))
        wakes = self.coordinator.wakes_at
        if wakes is not None and (self._wake is None or wakes < self._wake):
            self._wake = max(wakes, self._clock.now)
            self._clock.at(self._wake, self._ring, self._wake)

    def _judge(self, values: Mapping[str, float]) -> None:
        self._judging = False
        self.put(lambda: self.coordinator.receive_evaluation(values))

    def _ring(self, time: float) -> None:
        if time != self._wake:
            return  # an earlier one was asked for since
        self._wake = None
        ticks = self._ticks + 1
        if ticks > MOST_TICKS:
            raise PolicyError(
                f"The merge policy {type(self.coordinator.policy).__name__} asked {MOST_TICKS} times in a row to be asked "
                "again, and decided nothing while nothing else happened."
            )
        self.put(self.coordinator.tick)
        self._ticks = ticks
