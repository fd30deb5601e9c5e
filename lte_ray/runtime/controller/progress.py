"""What displays show of a run, and a warning when nothing moves."""

from __future__ import annotations

import logging
import time

from lte_ray import storage
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.settings import Settings
from lte_ray.run.metrics import Progress, samples_per_second
from lte_ray.runtime.controller.head_actors import HasSlots, SlotState
from lte_ray.runtime.controller.run_state import RunState

STALLED_AFTER = 30.0
"""Seconds without a step or a merge after which the run says what it waits for, and between two such warnings."""

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

    def check_for_stall(self) -> None:
        """Says what the run waits for, when nothing has moved for long."""
        now = time.monotonic()
        position = (sum(status.step for status in self._state.statuses.values()), self._state.newest_version)
        if position != self._position:
            self._position, self._moved_at, self._warned_at, self._stall_note = position, now, 0.0, ""
            return
        still = now - self._moved_at
        if still < STALLED_AFTER:
            return
        why = self._explain()
        self._stall_note = f"nothing has moved for {still:.0f} s: {why}"
        if still - self._warned_at >= STALLED_AFTER:
            self._warned_at = still
            log.warning("%s", self._stall_note)
            self._state.log.record_event("still", seconds=round(still), why=why)

    def _explain(self) -> str:
        state, reasons = self._state, []
        for slot in self._heads.slots:
            if slot.state is SlotState.RESTARTING:
                reasons.append(f"{slot.name} is to be started again")
            elif not slot.has_answered and not slot.ended:
                reasons.append(f"{slot.name} is starting, or waits for resources of the cluster")
        reasons += [f"head {s.head} is {s.state}" + (f" ({s.note})" if s.note else "") for s in state.statuses.values()]
        if state.waiting_for:
            reasons.append(f"the coordinator waits {state.waiting_for}")
        reasons += [problem for problem in (storage.pending_problem(), state.storage_problem) if problem]
        return "; ".join(reasons) or "unknown"

    def snapshot(self) -> Progress:
        """Returns the run as it is now."""
        state, settings = self._state, self._settings
        statuses = tuple(state.statuses[n] for n in sorted(state.statuses))
        step = min((s.step for s in statuses), default=0)
        if is_shared(settings):
            step = sum(s.step for s in statuses) // settings.lte.num_heads
        recent = state.merges[-RECENT_MERGES:]
        steps_per_head = sum(merge.steps for merge in recent[1:]) / len(statuses or (0,))
        seconds_per_step = (recent[-1].at - recent[0].at) / max(1, steps_per_head) if len(recent) > 1 else None
        notes = (state.phase.note, self._stall_note, state.log.problem, state.storage_problem, *(s.note for s in statuses))
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
        )
