"""The state of a chaos world: its driver's view of the run, and everything that lives or lies somewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from lte_ray.engine.prepare import extend_plans, prepare
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.account import Account
from tests.chaos.coordinator import ChaosCoordinator
from tests.chaos.parts import MOST_HEADS, Call, Disk, LinearFit, Mode
from tests.chaos.process import ChaosHeadProcess


@dataclass(eq=False)
class Slot:
    """A head's place, as the driver sees it; `gone`: it knows that the process is. `end`: the step at which it was over."""

    process: ChaosHeadProcess | None
    incarnation: int = 0
    lost: bool = False
    ended: bool = False
    end_step: int = 0


class ChaosRun:
    """One run: its members, its coordinator (None while there is none), its checkpoints, and what is on the wire.

    Args:
        mode: how it merges.
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
        self.answered_calls: list[Call] = []  # contributions that were answered
        self.happened: Counter[str] = Counter()
        self.launch()

    def launch(self) -> None:
        self.incarnations: dict[int, int] = {}
        self.slots = {n: Slot(self.new_process(n, 0)) for n in range(self.settings.lte.num_heads)}
        self.coordinator = self.new_coordinator(self.start)

    def new_process(self, number: int, incarnation: int) -> ChaosHeadProcess:
        return ChaosHeadProcess(self.settings, self.initial, number, incarnation, self.epoch, self.disk)

    def new_coordinator(self, start: CoordinatorState) -> ChaosCoordinator:
        return ChaosCoordinator(self.mode, self.settings, self.initial, start, self.account, self.disk)

    @property
    def processes(self) -> list[ChaosHeadProcess]:
        return [member.process for _, member in sorted(self.slots.items()) if member.process is not None]

    @property
    def calls_on_the_wire(self) -> list[Call]:
        """Calls that are on their way to the coordinator, those of the dead included."""
        return [call for p in self.processes for call in p.calls if call.place == "wire"] + self.orphaned_calls


def pick_one(found: list[Any], pick: int) -> Any:
    """One of a list; None if it is empty."""
    return found[pick % len(found)] if found else None
