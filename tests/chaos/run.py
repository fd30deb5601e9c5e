"""The state of a chaos world: the driver's view of the run, its processes, its checkpoints and the messages on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from lte_ray.engine.head.snapshot import SavedState
from lte_ray.engine.prepare import extend_plans, prepare
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.account import Account
from tests.chaos.coordinator import ChaosCoordinator
from tests.chaos.parts import MOST_HEADS, Call, Disk, LinearFit, Mode
from tests.chaos.process import ChaosHeadProcess


@dataclass(eq=False)
class Slot:
    """A head's slot, as the driver sees it.

    Attributes:
        process: None if it is dead.
        incarnation: processes that there were before.
        lost: whether the driver knows that the process is dead.
        moved: the state that the last process left, if it has moved.
        ended: whether the head has ended its work, at step `end_step`.
    """

    process: ChaosHeadProcess | None
    incarnation: int = 0
    lost: bool = False
    moved: SavedState | None = None
    ended: bool = False
    end_step: int = 0


class ChaosRun:
    """One run.

    Args:
        mode: how it merges.

    Attributes:
        coordinator: None while there is none.
        saved: the newest complete checkpoint that the driver knows of.
        slots: by head.
        orphaned_calls: contributions of dead processes that may still arrive.
        answered_calls: contributions that were answered, and that may arrive again.
        happened: how often each kind of event did.
    """

    saved: int | None
    coordinator: ChaosCoordinator | None

    def __init__(self, mode: Mode) -> None:
        self.mode, self.settings = mode, mode.settings()
        self.initial = extend_plans(prepare(LinearFit(), self.settings, torch.float64), MOST_HEADS)
        self.account = Account({0: self.initial.base.clone()}, {0: {}})
        self.first = self.account.copy()
        self.disk, self.epoch = Disk(), 0
        self.start, self.saved = CoordinatorState(0, self.initial.base), None
        self.orphaned_calls: list[Call] = []
        self.answered_calls: list[Call] = []
        self.happened: Counter[str] = Counter()
        self.launch()

    def launch(self) -> None:
        self.incarnations: dict[int, int] = {}
        self.slots = {n: Slot(self.new_process(n, 0)) for n in range(self.settings.lte.num_heads)}
        self.coordinator = self.new_coordinator(self.start)

    def new_process(self, number: int, incarnation: int, moved: SavedState | None = None) -> ChaosHeadProcess:
        return ChaosHeadProcess(self.settings, self.initial, number, incarnation, self.epoch, self.disk, moved)

    def new_coordinator(self, start: CoordinatorState) -> ChaosCoordinator:
        return ChaosCoordinator(self.mode, self.settings, self.initial, start, self.account, self.disk)

    @property
    def processes(self) -> list[ChaosHeadProcess]:
        return [slot.process for _, slot in sorted(self.slots.items()) if slot.process is not None]

    @property
    def calls_on_the_wire(self) -> list[Call]:
        """Calls on their way to the coordinator, also those of dead processes."""
        return [call for p in self.processes for call in p.calls if call.place == "wire"] + self.orphaned_calls


def pick_one(choices: list[Any], pick: int) -> Any:
    """Returns one of a list; None if it is empty."""
    return choices[pick % len(choices)] if choices else None
