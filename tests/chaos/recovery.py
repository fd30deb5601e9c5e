"""Deaths of the coordinator and of whole runs in a chaos world: what `runtime.mending` and `runtime.resuming` do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from lte_ray.engine.coordinator.recovery import heads_in_checkpoint, recover
from lte_ray.messages import RecoveryReport
from lte_ray.runtime import coordinator_state
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.deaths import Deaths
from tests.chaos.parts import LocalTransport


class Recovery(Deaths):
    """The coordinator dies, or everything does; the run goes on from what heads know, or from a checkpoint."""

    def on_kill_hub(self, pick: int, amount: int) -> bool:
        """The coordinator dies; what it has answered may still arrive."""
        if self.coordinator is None:
            return False
        self.coordinator = None
        self.orphaned_calls, self.answered_calls = [], []  # they were on their way to it
        for process in self.processes:
            process.resend()
        return True

    def on_recover(self, pick: int, amount: int) -> bool:
        """Another coordinator goes on; `FailureHandler._recover`."""
        if self.coordinator is not None:
            return False
        self.epoch += 1
        reports = [process.report(self.epoch) for process in self.processes]
        start, astray = self._state_after(reports)
        self._roll_back_account(start)
        out = {n for n, m in self.slots.items() if m.ended and m.process is not None and m.process.quarantined}
        self.coordinator = self.new_coordinator(replace(start, members=frozenset(set(self.slots) - out)))
        reporting = {number for report in reports for number in report.heads}
        for number, member in self.slots.items():
            held = start.position(number)
            if member.ended and number not in reporting and held.step < member.end_step:  # `FailureHandler._undone`
                member.ended, member.lost = False, True
                member.incarnation += 1
            if number in astray and member.process is not None and not member.ended:
                member.process.alive = False
                member.process, member.lost = None, True
                member.incarnation += 1
        for number, member in sorted(self.slots.items()):
            if member.lost:
                self.coordinator.lose(number, False)
            if member.ended:
                self.coordinator.leave(number)
        return True

    def _state_after(self, reports: list[RecoveryReport]) -> tuple[CoordinatorState, Iterable[int]]:
        """`FailureHandler._start`."""
        saved, found = self.saved, recover(reports)
        if found is None or (saved is not None and saved > found.version):
            if saved is None or saved == self.start.version:
                self._restore_account(saved)
                return replace(self.start, epoch=self.epoch), frozenset()
            self._restore_account(saved)
            return replace(self._load(saved, self.settings.lte.num_heads), epoch=self.epoch), list(self.slots)
        references, states = dict(found.references), frozenset[int]()
        if saved is not None:
            kept = self.disk.checkpoints[saved]
            states = frozenset(kept.parts)
            fit = heads_in_checkpoint(found, kept.facts["standings"])
            references |= {head: factors.clone() for head, factors in kept.references.items() if head in fit}
        exact = self.start.exact_heads - found.step_limits.keys() if found.version == self.start.version else frozenset()
        return CoordinatorState.from_recovered(
            found, references, checkpoint_version=saved, exact_heads=exact, saved_heads=states, epoch=self.epoch
        ), found.restart_heads

    def _load(self, version: int, heads: int) -> CoordinatorState:
        """What the runtime makes of a checkpoint."""
        common: Any = SimpleNamespace(directory=LocalTransport(), transport=LocalTransport())
        with patch.object(coordinator_state, "checkpoint", self.disk):
            return coordinator_state.load_checkpoint(common, self.initial, version, heads)

    def _roll_back_account(self, start: CoordinatorState) -> None:
        self.account.rollback(
            start.version,
            None if start.checkpoint_version is None else self.disk.checkpoints[start.checkpoint_version].account.momentum,
        )

    def on_crash(self, pick: int, amount: int) -> bool:
        """Everything dies; the run is resumed from the newest checkpoint, with another number of heads if `amount` > 4."""
        if not self.disk.checkpoints and pick % 4:
            return False  # to begin at the start again and again shows little
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
        """The account is that of a checkpoint, or of the start."""
        self.account = self.first.copy() if saved is None else self.disk.checkpoints[saved].account.copy()
