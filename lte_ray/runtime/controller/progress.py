"""What displays show of a run, and a warning when nothing moves."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from lte_ray import storage
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.settings import Settings
from lte_ray.messages import HeadStatus
from lte_ray.run.metrics import Progress, samples_per_second
from lte_ray.runtime.controller.head_actors import HasSlots, SlotState
from lte_ray.runtime.controller.run_state import RunPhase, RunState

STALLED_AFTER = 30.0
"""Seconds without a step or a merge after which the run says what it waits for. It says so again after twice the time, each
time."""

RECENT_MERGES = 10
"""Merges by which the remaining time is estimated."""

log = logging.getLogger("lte_ray")


class ProgressMonitor:
    """Sums up the state of a run, and notices when it stalls.

    Args:
        state: of the run.
        heads: its processes of heads.
        settings: of the run.
    """

    def __init__(self, state: RunState, heads: HasSlots, settings: Settings) -> None:
        self._state, self._heads, self._settings = state, heads, settings
        self._position = (0, 0)  # all heads' steps together, and the newest version
        self._moved_at = time.monotonic()  # when that changed last
        self._warned_at = 0.0  # after how many seconds without change there was a warning
        self._stall_note = ""
        self._steps = dict(state.start_steps)  # by head, the last one known

    def check_for_stall(self) -> None:
        """Says what the run waits for, when nothing has moved for long. Starting, compiling and evaluating may take long."""
        now = time.monotonic()
        position = (sum(status.step for status in self._state.statuses.values()), self._state.newest_version)
        if position != self._position or self._state.phase is RunPhase.EVALUATING or self._starting():
            self._position, self._moved_at, self._warned_at, self._stall_note = position, now, 0.0, ""
            return
        still = now - self._moved_at
        if still < STALLED_AFTER:
            return
        why = self._explain()
        self._stall_note = f"nothing has moved for {still:.0f} s: {why}"
        if still >= max(STALLED_AFTER, 2 * self._warned_at):
            self._warned_at = still
            log.warning("%s", self._stall_note)
            self._state.log.record_event("still", seconds=round(still), why=why)

    def _starting(self) -> str:
        """Which heads start or compile, in words; empty if none does. One that waits for a place doesn't start."""
        heads: dict[str, list[int]] = {}
        for slot in self._heads.slots:
            statuses = [self._state.statuses[number] for number in slot.numbers if number in self._state.statuses]
            if slot.state is not SlotState.TRAINING:
                continue
            if any(s.state == "compiling" for s in statuses):
                heads.setdefault("compiling", []).extend(slot.numbers)
            elif slot.health.begun is not None and (not slot.has_answered or any(_is_before_first_step(s) for s in statuses)):
                # Ray Train doesn't tell whether its processes have a place.
                what = "starting" if slot.strategy is not None else "starting, or waiting for resources of the cluster"
                heads.setdefault(what, []).extend(slot.numbers)
        return ", ".join(_describe(numbers, what) for what, numbers in heads.items())

    def _explain(self) -> str:
        state, reasons, explained = self._state, [], set[int]()
        for slot in self._heads.slots:
            if slot.state is SlotState.RESTARTING:
                reasons.append(f"{slot.name} {slot.verb} to be started again")
            elif not slot.has_answered and not slot.ended:
                reasons.append(f"{slot.name} {slot.verb} starting, or {slot.waits} for resources of the cluster")
            else:
                continue
            explained |= set(slot.numbers)
        by_state: dict[str, list[int]] = {}
        for s in state.statuses.values():
            if s.head not in explained:
                by_state.setdefault(s.state + (f" ({s.note})" if s.note else ""), []).append(s.head)
        reasons += [_describe(heads, what) for what, heads in by_state.items()]
        if state.waiting_for:
            reasons.append(f"the coordinator waits {state.waiting_for}")
        reasons += [problem for problem in (storage.pending_problem(), state.storage_problem) if problem]
        return "; ".join(reasons) or "unknown"

    def _with_known_step(self, status: HeadStatus) -> HeadStatus:
        """A process that starts doesn't know yet where its heads were."""
        if status.step or status.state != "starting":
            self._steps[status.head] = status.step
        return replace(status, step=self._steps.get(status.head, 0))

    def snapshot(self) -> Progress:
        """Returns the run as it is now."""
        state, settings = self._state, self._settings
        statuses = tuple(self._with_known_step(state.statuses[n]) for n in sorted(state.statuses))
        steps = [s.step for s in statuses] or list(state.start_steps.values())
        step = sum(steps) // settings.lte.num_heads if is_shared(settings) else min(steps, default=0)
        recent = state.merges[-RECENT_MERGES:]
        steps_per_head = sum(merge.steps for merge in recent[1:]) / len(statuses or (0,))
        seconds_per_step = (recent[-1].at - recent[0].at) / max(1, steps_per_head) if len(recent) > 1 else None
        starting = self._starting() if state.phase is RunPhase.TRAINING else ""
        notes = (state.phase.note, starting, state.log.problem, state.storage_problem, *(s.note for s in statuses))
        return Progress(
            run=settings.run,
            step=step,
            steps=settings.train.steps,
            samples=sum(s.samples for s in statuses),
            samples_per_second=samples_per_second(state.merges),
            version=state.newest_version,
            heads=statuses,
            evaluation=state.evaluations[-1] if state.evaluations else None,
            seconds=time.time() - state.started_at,
            remaining=None if seconds_per_step is None else seconds_per_step * (settings.train.steps - step),
            checkpoint=state.checkpoint,
            note=next((note for note in notes if note), ""),
            baseline=settings.train.baseline,
            stalled=self._stall_note,
        )


def _is_before_first_step(status: HeadStatus) -> bool:
    """Whether the process prepares its first step: it builds the model, or reads the data."""
    return status.state == "starting" or (status.state == "training" and status.first_step_at is None)


def _describe(heads: Sequence[int], what: str) -> str:
    """``head 3 is starting``, ``heads 0-3 are starting``."""
    if len(heads) == 1:
        return f"head {heads[0]} is {what}"
    adjacent = len(heads) > 2 and sorted(heads) == list(range(min(heads), max(heads) + 1))
    shown = f"{min(heads)}-{max(heads)}" if adjacent else ", ".join(map(str, sorted(heads)))
    return f"heads {shown} are {what}"
