"""What the driver knows of a run: its phase, its heads, its merges and evaluations, and the newest checkpoint.

The other modules of the controller read these facts and change them through methods. `RunState` knows none of them.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from lte_ray.config import TrainConfig
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.run.callbacks import CallbackList
from lte_ray.run.error_log import ErrorLog
from lte_ray.run.metrics import RATE_WINDOW, Evaluation, MetricsLog
from lte_ray.run.stop_request import StopRequests
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory

MAX_QUEUED_EVALUATIONS = 2
"""Versions that may wait for evaluation. If there are more, those in the middle are skipped, so that memory stays bounded."""

JOB_STOP = 3.0
"""Seconds that Ray gives a stopped job by default (RAY_JOB_STOP_WAIT_TIME_S) before it kills it."""

log = logging.getLogger("lte_ray")


class RunPhase(Enum):
    """What the run is doing."""

    STARTING = auto()
    TRAINING = auto()
    SAVING = auto()
    EVALUATING = auto()
    FINISHED = auto()
    FAILED = auto()

    @property
    def note(self) -> str:
        """What a display says of the phase; empty if it says nothing."""
        return PHASE_NOTES.get(self, "")


PHASE_NOTES = {RunPhase.SAVING: "saving the last version", RunPhase.EVALUATING: "evaluating the last version"}
"""What a display says of a phase. While the heads train, their progress says enough."""

PHASES = {
    RunPhase.STARTING: {RunPhase.TRAINING, RunPhase.FAILED},
    RunPhase.TRAINING: {RunPhase.SAVING, RunPhase.FAILED},
    RunPhase.SAVING: {RunPhase.TRAINING, RunPhase.EVALUATING, RunPhase.FAILED},  # back if heads must train again
    RunPhase.EVALUATING: {RunPhase.FINISHED, RunPhase.FAILED},
    RunPhase.FINISHED: set[RunPhase](),
    RunPhase.FAILED: set[RunPhase](),
}
"""The phases that may follow each phase."""


@dataclass(frozen=True)
class PendingEvaluation:
    """A version of the base to evaluate.

    Attributes:
        version: its number.
        step: the furthest that a head of it had reached.
        base: refers to its weights.
        ema: refers to the moving average of the bases up to it; None if there is none.
        adapters: by head, refers to its own factors, where nothing is merged.
    """

    version: int
    step: int
    base: Any
    ema: Any = None
    adapters: Mapping[int, Any] = field(default_factory=dict)


class RunState:
    """The facts of one run.

    Args:
        directory: of the run.
        num_heads: heads that it starts with.
        start: where it starts.
        callbacks: that follow it and may end it early; None if there are none.

    Attributes:
        phase: what the run is doing.
        started_at: when this process began the run (Unix time).
        statuses: by head, its newest status.
        merges: in order, since the version that this process started from.
        evaluations: in order.
        checkpoint: the newest complete one; None before there is one.
        sample: what the worker's `sample` returned for the final weights.
        log: `metrics.jsonl`.
        errors: `errors.log`.
        start_steps: by head, the step that it started from.
        waiting_for: what the coordinator waits for, in words.
        storage_problem: what is wrong with the coordinator's storage; empty if nothing.
        queue, evaluating: versions that wait for evaluation, and the one that the evaluator has now.
        rules: may ask that the run ends early.
        stopped: why it did; None if it didn't.
    """

    def __init__(
        self,
        directory: RunDirectory,
        num_heads: int,
        start: CoordinatorState,
        callbacks: CallbackList | None = None,
    ) -> None:
        self._directory = directory
        self.phase = RunPhase.STARTING
        self.started_at = time.time()
        self.statuses: dict[int, HeadStatus] = {}
        self.merges: list[MergeRecord] = []
        self.evaluations: list[Evaluation] = []
        self.checkpoint = start.checkpoint_version
        self.sample: str | None = None
        self.waiting_for = self.storage_problem = ""
        self.queue: deque[PendingEvaluation] = deque()
        self.evaluating: PendingEvaluation | None = None
        self._first_version = start.version
        self.start_steps = dict(start.steps_by_head)
        self.errors = ErrorLog(directory)
        self._newest_refusal = (0, 0)  # epoch and number of the newest refusal in the log
        self._reported_untrained: set[str] = set()
        self._reported_harmful: set[tuple[int, int, int]] = set()  # head, epoch, sequence of harmful contributions in the log
        self.rules = callbacks.rules if callbacks is not None else StopRules(TrainConfig(), "", 0.0)
        self.stopped: Stop | None = None
        self._requests = StopRequests(directory, self.rules)
        self.log = MetricsLog(directory)
        self._callbacks = callbacks
        if callbacks is not None:
            self.log.listeners.append(callbacks.handle_row)
        self.log.rewind(start.version)
        if start.version:
            new_heads = [head for head in range(num_heads) if not start.position(head).sequence]
            self.log.record_event("resumed", version=start.version, heads=num_heads, anew=new_heads)

    def enter(self, phase: RunPhase) -> None:
        """Changes the phase, in an order that `PHASES` allows."""
        if phase is not self.phase:
            assert phase in PHASES[self.phase], f"{self.phase} can't be followed by {phase}"
            self.phase = phase

    def end_early(self, why: BaseException, grace: float) -> float:
        """Records that the run ends early; returns until when (monotonic) its state may be saved.

        Args:
            why: what ends the run.
            grace: seconds to save; 0: as long as Ray gives a stopped job.
        """
        self.enter(RunPhase.FAILED)
        end = time.monotonic() + (grace or max(1.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP)) - 0.5))
        self.log.record_event("ended_early", why=f"{type(why).__name__}: {why}"[:500])
        return end

    def finish(self) -> None:
        """Records that the run has ended without an error: its model is exported, and its last version is evaluated."""
        self.enter(RunPhase.FINISHED)
        self.log.record_event("finished", version=self.newest_version)

    @property
    def ends_early(self) -> bool:
        """Whether the run is to end before its last step: it was asked to, and this process has merged something."""
        return self.rules.stop is not None and bool(self.merges)

    def check_stops(self) -> None:
        """Ends the run early if it has taken its time, or others ask for it by its files.

        Raises:
            LeaseLost: another driver has taken it over.
        """
        self._directory.check_lease()
        self.rules.check_time()
        self._requests.poll()

    def record_stop(self, version: int) -> None:
        """Records that the run ends at this version, before its last step, as `rules` ask."""
        assert self.rules.stop is not None
        self.stopped = self.rules.stop
        self.log.record_event("stopped", by=self.stopped.kind, why=self.stopped.reason, version=version)
        log.warning("The run ends at version %d: %s.", version, self.stopped.reason)

    @property
    def newest_version(self) -> int:
        """The newest version that the driver knows of."""
        return self.merges[-1].version if self.merges else self._first_version

    # -- heads ---------------------------------------------------------------------------------------------------------

    def record_heads(self, statuses: Iterable[HeadStatus], epoch: int) -> None:
        """Records statuses of heads; `epoch` is the coordinator's now.

        A coordinator that was lost can't report the harmful contributions that it refused; the heads that sent them do.
        """
        for status in statuses:
            self.statuses[status.head] = status
            if status.untrained and status.untrained not in self._reported_untrained:
                self._reported_untrained.add(status.untrained)
                self.log.record_event("untrained", head=status.head, why=status.untrained)
                log.warning("Head %d: %s.", status.head, status.untrained)
            for refused_by, sequence in status.dropped:
                if refused_by < epoch and (status.head, refused_by, sequence) not in self._reported_harmful:
                    self._reported_harmful.add((status.head, refused_by, sequence))
                    why = "poison, as the coordinator said before it was lost"
                    self.log.record_event("refused", head=status.head, sequence=sequence, why=why, poison=True)

    def set_head_state(self, heads: Iterable[int], state: str) -> None:
        """Sets the state of heads whose process can't report it."""
        self.statuses |= {n: replace(self.statuses[n], state=state, note="") for n in heads if n in self.statuses}

    def forget_heads(self, heads: Iterable[int]) -> None:
        """Forgets heads that have left the run."""
        for head in heads:
            self.statuses.pop(head, None)

    def is_quarantined(self, head: int) -> bool:
        """Whether the head trains no more since its contributions were refused."""
        return head in self.statuses and self.statuses[head].state == "quarantined"

    def have_stepped(self, heads: Collection[int]) -> bool:
        """Whether each of these heads has taken a step."""
        return all(head in self.statuses and self.statuses[head].step for head in heads)

    @property
    def furthest_step(self) -> int:
        """The furthest local step of any head."""
        return max((status.step for status in self.statuses.values()), default=0)

    def devices(self) -> dict[int, str]:
        """Returns by head the device that it trains on."""
        return {head: status.device for head, status in sorted(self.statuses.items())}

    # -- versions ------------------------------------------------------------------------------------------------------

    def record_coordinator(self, status: CoordinatorStatus, epoch: int) -> None:
        """Records what the coordinator of this epoch says."""
        if status.storage_problem and status.storage_problem != self.storage_problem:
            self.log.record_event("storage", why=status.storage_problem)
            log.warning("%s", status.storage_problem)
        self.storage_problem, self.waiting_for = status.storage_problem, status.waiting_for
        for number, result in status.refusals:
            if (epoch, number) > self._newest_refusal:
                self._newest_refusal = (epoch, number)
                if result.harmful:
                    self._reported_harmful.add((result.head, epoch, result.sequence))
                self.log.record_event(
                    "refused", head=result.head, sequence=result.sequence, why=result.reason, poison=result.harmful
                )
        for record in status.merges:
            if record.version > self.newest_version:  # two answers may report the same merge
                self._record_merge(record)
        if status.checkpoint is not None and status.checkpoint != self.checkpoint:
            self.checkpoint = status.checkpoint
            if self._callbacks is not None:
                self._callbacks.handle_checkpoint(status.checkpoint)

    def _record_merge(self, record: MergeRecord) -> None:
        if record.base is not None:
            self.queue.append(PendingEvaluation(record.version, record.step, record.base, record.ema, record.adapters))
            while len(self.queue) > MAX_QUEUED_EVALUATIONS:
                del self.queue[1]  # the first may be version 0, with which all others are compared
        before = self.merges[-RATE_WINDOW:]
        # Appended first: else an interrupt in a callback that gets the row would have the merge recorded twice.
        self.merges.append(replace(record, base=None, ema=None, adapters={}))  # a reference would keep the base in memory
        self.log.record_merge(record, before)
        self.rules.record_merge(record)

    def record_evaluation(self, evaluation: Evaluation) -> None:
        """Records the result of an evaluation.

        Raises:
            ConfigError: it lacks a figure that a setting names.
        """
        self.evaluations.append(evaluation)
        self.log.record_evaluation(evaluation)
        self.rules.record_evaluation(evaluation.values)

    def rewind(self, version: int) -> None:
        """The run continues from `version`: drops what was recorded of later versions."""
        self.merges = [merge for merge in self.merges if merge.version <= version]
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation.version <= version]
        self.queue.clear()
        self.evaluating = None
        if not self.merges:
            self._first_version = min(version, self._first_version)
        self.log.rewind(version)
