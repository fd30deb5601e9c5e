"""Deaths of the coordinator and of whole runs in a chaos world: what `runtime.controller.coordinator_recovery` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from lte_ray.engine.coordinator.recovery import heads_in_checkpoint, recover
from lte_ray.merging.registry import make_policy
from lte_ray.messages import RecoveryReport
from lte_ray.runtime import coordinator_state
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.deaths import Deaths
from tests.chaos.parts import LocalTransport


class Recovery(Deaths):
    """The coordinator dies, or everything does. The run continues from what heads know, or from a checkpoint."""

    def on_kill_hub(self, pick: int, amount: int) -> bool:
        """The coordinator dies; replies that it has sent may still arrive."""
        if self.coordinator is None:
            return False
        self.coordinator = None
        self.orphaned_calls, self.answered_calls = [], []  # they were on their way to it
        for process in self.processes:
            process.resend()
        return True

    def on_recover(self, pick: int, amount: int) -> bool:
        """Another coordinator continues; `CoordinatorRecovery.restart`."""
        if self.coordinator is not None:
            return False
        self.epoch += 1
        reports = [process.report(self.epoch) for process in self.processes]
        start, astray = self._state_after(reports)
        self._roll_back_account(start)
        quarantined = {n for n, m in self.slots.items() if m.ended and m.process is not None and m.process.quarantined}
        self.coordinator = self.new_coordinator(replace(start, members=frozenset(set(self.slots) - quarantined)))
        reporting = {number for report in reports for number in report.heads}
        for number, slot in self.slots.items():
            position = start.position(number)
            if (
                slot.ended and number not in reporting and position.step < slot.end_step
            ):  # `CoordinatorRecovery._ended_unmerged`
                slot.ended, slot.lost = False, True
                slot.incarnation += 1
            if number in astray and slot.process is not None and not slot.ended:
                slot.process.alive = False
                slot.process, slot.lost = None, True
                slot.incarnation += 1
        for number, slot in sorted(self.slots.items()):
            if slot.lost:
                self.coordinator.lose(number, False)
            if slot.ended:
                self.coordinator.leave(number)
        return True

    def _state_after(self, reports: list[RecoveryReport]) -> tuple[CoordinatorState, Iterable[int]]:
        """Returns the state to continue from, and the heads that must start again; `CoordinatorRecovery._state_after`."""
        saved, recovered = self.saved, recover(reports)
        if recovered is None or (saved is not None and saved > recovered.version):
            if saved is None or saved == self.start.version:
                self._restore_account(saved)
                return replace(self.start, epoch=self.epoch), frozenset()
            self._restore_account(saved)
            return replace(self._load(saved, self.settings.lte.num_heads), epoch=self.epoch), list(self.slots)
        references, states = dict(recovered.references), frozenset[int]()
        if saved is not None:
            stored = self.disk.checkpoints[saved]
            states = frozenset(stored.parts)
            matching = heads_in_checkpoint(recovered, stored.facts["standings"])
            references |= {head: factors.clone() for head, factors in stored.references.items() if head in matching}
        exact = (
            self.start.exact_heads - recovered.step_limits.keys() if recovered.version == self.start.version else frozenset()
        )
        momentum = recovered.momentum
        if recovered.version == self.start.version:
            momentum = self.start.momentum
        elif recovered.version == saved:
            momentum = self.disk.checkpoints[recovered.version].momentum
        return CoordinatorState.from_recovered(
            recovered,
            references,
            momentum,
            checkpoint_version=saved,
            exact_heads=exact,
            saved_heads=states,
            epoch=self.epoch,
        ), recovered.restart_heads

    def _load(self, version: int, heads: int) -> CoordinatorState:
        """Loads a checkpoint as the runtime does."""
        context: Any = SimpleNamespace(directory=LocalTransport(), transport=LocalTransport(), settings=self.settings)
        with patch.object(coordinator_state, "checkpoint", self.disk):
            return coordinator_state.load_checkpoint(
                context, self.initial.plans, version, heads, make_policy(self.settings.merge)
            )

    def _roll_back_account(self, start: CoordinatorState) -> None:
        saved = start.version in (self.start.version, start.checkpoint_version)
        self.account.rollback(start.version, keeps_momentum=self.mode.redo or saved)

    def on_crash(self, pick: int, amount: int) -> bool:
        """Everything dies. The run resumes from the newest checkpoint, with another number of heads if `amount` > 4."""
        if not self.disk.checkpoints and pick % 4:
            return False  # starting from version 0 again and again tests little
        heads = self.settings.lte.num_heads
        if amount > 4:
            heads = 1 + (heads + pick) % 4
        self.orphaned_calls, self.answered_calls, self.epoch = [], [], 0
        self.settings = self.mode.settings(heads)
        self.saved = max(self.disk.checkpoints, default=None)
        if self.saved is None:
            self.start = CoordinatorState(0, self.initial.base)
        else:
            self.start = self._load(self.saved, heads)
        for process in self.processes:
            process.alive = False
        self._restore_account(self.saved)
        self.launch()
        return True

    def _restore_account(self, saved: int | None) -> None:
        """Sets the account back to that of a checkpoint, or of the start."""
        self.account = self.first.copy() if saved is None else self.disk.checkpoints[saved].account.copy()
