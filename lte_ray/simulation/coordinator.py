"""The coordinator's process under the virtual clock: it handles one message at a time, and each takes time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

from torch import Tensor

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.errors import PolicyError
from lte_ray.messages import Contribution, MergeRecord
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.cost_model import CostModel
from lte_ray.simulation.head import Answer, Timeline
from lte_ray.simulation.record import MergeRow

MAX_TICKS = 10_000
"""How often in a row a policy may ask to be called again while nothing else happens."""

Message = Callable[[], EventResult]


class SimCoordinator:
    """Drives the engine's coordinator, and counts what it merged.

    Args:
        evaluate: evaluates a base, for policies that try one; None if there is no model.

    Attributes:
        merges: one row each.
        lags: how many contributions were merged at each lag.
        merged_contributions: how many contributions were merged up to each version.
        arrivals: contributions that have arrived.
        busy_seconds: spent on messages and merges.
        timeline: what the coordinator is doing.
        base: the newest, which is not written to again.
    """

    def __init__(
        self,
        clock: Clock,
        coordinator: Coordinator,
        cluster: ClusterModel,
        costs: CostModel,
        evaluate: Callable[[Tensor], Mapping[str, float]] | None,
    ) -> None:
        self.coordinator, self.merges, self.lags = coordinator, list[MergeRow](), Counter[int]()
        self.merged_contributions = [0]
        self.arrivals = 0
        self.busy_seconds = 0.0
        self.timeline = Timeline("idle", draw=True)
        self.base = coordinator.base.clone()
        self._clock, self._cluster, self._costs = clock, cluster, costs
        self._evaluate = evaluate
        self._send_answer: Callable[[Answer], None] = lambda answer: None
        self._on_merge: Callable[[], None] = lambda: None
        self._incarnations: dict[int, int] = {}  # of each head's newest contribution
        self._queue: deque[Message] = deque()
        self._busy = self._evaluating = False
        self._wake_time: float | None = None
        self._ticks = 0

    def connect(self, send_answer: Callable[[Answer], None], on_merge: Callable[[], None]) -> None:
        """Sets what sends answers to heads, and what is called after a merge once its answers are sent."""
        self._send_answer, self._on_merge = send_answer, on_merge

    @property
    def idle(self) -> bool:
        """Whether nothing is being handled or waits to be."""
        return not self._busy and not self._queue and not self._evaluating

    def receive(self, contribution: Contribution) -> None:
        """Enqueues a contribution that has arrived."""
        self.arrivals += 1
        self.enqueue(lambda: self._receive(contribution))

    def enqueue(self, message: Message) -> None:
        """Enqueues a message: a call of the engine's coordinator, to be made in its turn."""
        self._ticks = 0
        self._queue.append(message)
        if not self._busy:
            self._handle_next()

    def _receive(self, contribution: Contribution) -> EventResult:
        self._incarnations[contribution.head] = contribution.incarnation
        return self.coordinator.receive(contribution, contribution.buffer)

    def _handle_next(self) -> None:
        result = self._queue.popleft()()
        if result.merges:
            self.base = self.coordinator.base.clone()  # the engine continues to write to its own
        cost = self._cluster.message_seconds
        merging = sum(self._costs.merge_seconds(self._cluster, len(merge.heads)) for merge in result.merges)
        self.busy_seconds += cost + merging
        self._busy = True
        self.timeline.enter("merge" if result.merges else "message", self._clock.now)
        if self._costs.dense_bytes:  # else no head waits for the base, which is updated while messages are handled
            cost += merging
        version = self.coordinator.version
        answers = [Answer(r.head, self._incarnations[r.head], r, version, self.base) for r in result.results]
        self._clock.schedule_after(cost, self._finish, answers, result.merges)
        self._schedule_requests()

    def _finish(self, answers: list[Answer], merges: tuple[MergeRecord, ...]) -> None:
        self.timeline.enter("idle", self._clock.now)
        for merge in merges:
            self._record_merge(merge)
        for answer in answers:
            self._send_answer(answer)
        self._busy = False
        if merges:
            self._on_merge()
        if self._queue and not self._busy:
            self._handle_next()

    def _record_merge(self, merge: MergeRecord) -> None:
        self.merged_contributions.append(self.merged_contributions[-1] + len(merge.heads))
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

    def _schedule_requests(self) -> None:
        """Schedules what the coordinator asks for: an evaluation, or to be called again at some time."""
        candidate = self.coordinator.candidate
        if candidate is not None and not self._evaluating:
            if self._evaluate is None:
                raise PolicyError(
                    f"The merge policy {type(self.coordinator.policy).__name__} evaluates what it merges, which a simulation "
                    "that only keeps time can't: give a WORKER, without --time-only."
                )
            self._evaluating = True
            seconds = self._cluster.evaluate_seconds
            self._clock.schedule_after(seconds, self._finish_evaluation, self._evaluate(candidate))
        wake_time = self.coordinator.wakes_at
        if wake_time is not None and (self._wake_time is None or wake_time < self._wake_time):
            self._wake_time = max(wake_time, self._clock.now)
            self._clock.schedule_at(self._wake_time, self._wake_up, self._wake_time)

    def _finish_evaluation(self, values: Mapping[str, float]) -> None:
        self._evaluating = False
        self.enqueue(lambda: self.coordinator.receive_evaluation(values))

    def _wake_up(self, time: float) -> None:
        if time != self._wake_time:
            return  # an earlier time was scheduled since
        self._wake_time = None
        ticks = self._ticks + 1
        if ticks > MAX_TICKS:
            raise PolicyError(
                f"The merge policy {type(self.coordinator.policy).__name__} asked {MAX_TICKS} times in a row to be asked "
                "again, and decided nothing while nothing else happened."
            )
        self.enqueue(self.coordinator.tick)
        self._ticks = ticks
