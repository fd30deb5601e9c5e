"""The actors of heads, seen from the driver: started, watched, and started again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

import ray

from lte_ray.checkpoint import FileEntry
from lte_ray.engine.hang_detector import HangDetector, ProcessHealth
from lte_ray.messages import CheckpointRequest, HeadStatus
from lte_ray.runtime.controller.actor_launcher import ActorLauncher
from lte_ray.runtime.controller.coordinator_group import CoordinatorGroup
from lte_ray.runtime.placement import has_several_nodes, is_placed

BLIND = 2.0
"""Seconds between two polls of the heads. If more pass, this process was busy or stopped, which says nothing of the heads."""

STATUS_WAIT = 0.2
"""Seconds that one poll waits for the heads' answers."""


class SlotState(Enum):
    """What an actor's slot is doing."""

    LAUNCHED = auto()
    """Its process starts; it waits until there is a coordinator."""
    TRAINING = auto()
    """Its process trains, or still waits for a place in the cluster."""
    LOST = auto()
    """Its process is gone, and nothing is decided yet."""
    RESTARTING = auto()
    """The next process starts at `restart_at`."""
    FINISHED = auto()
    """Its heads have ended their work; the process still writes their states into checkpoints."""
    EXITED = auto()
    """Its heads have ended their work, and the process is gone."""
    DROPPED = auto()
    """The run continues without these heads."""


SLOT_STATES = {
    SlotState.LAUNCHED: {SlotState.TRAINING},
    SlotState.TRAINING: {SlotState.LOST, SlotState.FINISHED},
    SlotState.LOST: {SlotState.RESTARTING, SlotState.DROPPED},
    SlotState.RESTARTING: {SlotState.TRAINING, SlotState.LOST},
    SlotState.FINISHED: {SlotState.EXITED},
    SlotState.EXITED: {SlotState.RESTARTING},  # steps that a lost coordinator hadn't published are taken again
    SlotState.DROPPED: set[SlotState](),
}
"""The states that may follow each state."""

HAS_PROCESS = (SlotState.LAUNCHED, SlotState.TRAINING, SlotState.FINISHED)
ENDED = (SlotState.FINISHED, SlotState.EXITED)


@dataclass(eq=False)
class HeadActorSlot:
    """The slot of one actor: its heads, and the process that hosts them now, if there is one.

    Attributes:
        numbers: of its heads.
        strategy: Ray's scheduling strategy of its processes.
        incarnation: how many processes there were before.
        state: what it is doing.
        actor: the process, in a state of `HAS_PROCESS`.
        run: the call that trains, while TRAINING.
        started_at: when it began to train, or to wait for a place (monotonic, like all times here).
        restart_at: when the next process starts, while RESTARTING.
        status_request: the status call without an answer, and since when; None if there is none.
        health: of the process.
        leaves_since: when the process was asked to leave its node; None if it wasn't.
        moved: states that the processes before have left when they moved, for the next one; None if the last one didn't move.
    """

    numbers: tuple[int, ...]
    strategy: Any
    incarnation: int = 0
    state: SlotState = SlotState.LAUNCHED
    actor: Any = None
    run: Any = None
    started_at: float = 0.0
    restart_at: float = 0.0
    status_request: tuple[Any, float] | None = None
    health: ProcessHealth = field(default_factory=ProcessHealth)
    leaves_since: float | None = None
    moved: dict[int, FileEntry] | None = None

    def enter(self, state: SlotState) -> None:
        """Changes the state, in an order that `SLOT_STATES` allows."""
        assert state in SLOT_STATES[self.state], f"{self.name}: {self.state} can't be followed by {state}"
        self.state = state

    @property
    def name(self) -> str:
        """For people."""
        first, last = self.numbers[0], self.numbers[-1]
        return f"head {first}" if first == last else f"heads {first}-{last}"

    @property
    def verb(self) -> str:
        """Follows the name."""
        return "is" if len(self.numbers) == 1 else "are"

    @property
    def waits(self) -> str:
        """Follows the name."""
        return "waits" if len(self.numbers) == 1 else "wait"

    @property
    def has_process(self) -> bool:
        """Whether there is a process, as far as the driver knows."""
        return self.state in HAS_PROCESS

    @property
    def ended(self) -> bool:
        """Whether its heads have ended their work."""
        return self.state in ENDED

    @property
    def has_answered(self) -> bool:
        """Whether the process has answered a status call, so that it has a place in the cluster and runs."""
        return self.health.answered is not None


class HasSlots(Protocol):
    """The processes of a run, as those see them who only look."""

    slots: list[HeadActorSlot]


class HeadActorGroup:
    """Starts the processes of heads and keeps track of them.

    Args:
        coordinator: to which they contribute.
        launcher: starts and ends actors.
        hang_detector: the run's.

    Attributes:
        slots: those that the run has; dropped ones are removed.
        changed_at: when a slot was dropped or its heads ended for the last time (monotonic).
    """

    def __init__(self, coordinator: CoordinatorGroup, launcher: ActorLauncher, hang_detector: HangDetector) -> None:
        self._coordinator, self._launcher, self._hang_detector = coordinator, launcher, hang_detector
        self.slots: list[HeadActorSlot] = []
        self.changed_at = 0.0
        self._polled_at: float | None = None
        self._next_incarnation: dict[int, int] = {}  # of heads that were dropped

    # -- states --------------------------------------------------------------------------------------------------------

    def launch_all(self, slots: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        """Starts the first processes, by their heads and scheduling strategies. They train once `start` tells them to."""
        for numbers, strategy in slots:
            slot = HeadActorSlot(numbers, strategy)
            slot.actor = self._launcher.launch_heads(numbers, strategy, 0)
            self.slots.append(slot)

    def add(self, numbers: tuple[int, ...], strategy: Any) -> None:
        """Adds a slot and starts its process. The heads may be new ones, or ones that were dropped."""
        incarnation = max(self._next_incarnation.get(number, 0) for number in numbers)
        slot = HeadActorSlot(numbers, strategy, incarnation, SlotState.RESTARTING)
        self.slots.append(slot)
        self.start(slot)

    def start(self, slot: HeadActorSlot) -> None:
        """Starts the slot's process, unless it is launched already, and has it train."""
        if slot.state is not SlotState.LAUNCHED:
            slot.actor = self._launcher.launch_heads(slot.numbers, slot.strategy, slot.incarnation, slot.moved)
        slot.enter(SlotState.TRAINING)
        slot.run = slot.actor.run.remote(self._coordinator.actor, self._coordinator.epoch)
        slot.started_at = time.monotonic()
        slot.status_request, slot.health, slot.leaves_since = None, ProcessHealth(), None

    def leave(self, slot: HeadActorSlot) -> None:
        """Asks the slot's process to leave its node: its `run` call returns once all that its heads have trained is merged."""
        slot.leaves_since = time.monotonic()
        slot.actor.leave.remote()

    def end_rounds(self) -> None:
        """Asks the heads that stay to end the rounds that they are in, so that those that leave need not wait for them."""
        for slot in self.training:
            if slot.leaves_since is None and slot.has_answered:
                slot.actor.end_round.remote()

    def end_process(self, slot: HeadActorSlot) -> None:
        """Ends what is left of the slot's process, if it has one; the next one is another incarnation."""
        if slot.actor is not None:
            self._launcher.end(slot.actor)
        if slot.has_answered:  # it may have trained since; what it leaves now, if it moves, is set afterwards
            slot.moved = None
        slot.actor = slot.run = slot.status_request = None
        slot.incarnation += 1
        if slot.state is SlotState.FINISHED:
            slot.enter(SlotState.EXITED)
        elif slot.state in (SlotState.TRAINING, SlotState.RESTARTING):
            slot.enter(SlotState.LOST)

    def restart(self, slot: HeadActorSlot, delay: float = 0.0) -> None:
        """Has another process start in `delay` seconds; the one before was ended."""
        slot.enter(SlotState.RESTARTING)
        slot.restart_at = time.monotonic() + delay

    def finish(self, slot: HeadActorSlot) -> None:
        """The slot's heads have ended their work."""
        slot.enter(SlotState.FINISHED)
        slot.run = None
        self.changed_at = time.monotonic()

    def drop(self, slot: HeadActorSlot) -> None:
        """Removes a slot whose process was ended. Contributions of that process, still on their way, don't count."""
        slot.enter(SlotState.DROPPED)
        self.changed_at = time.monotonic()
        self.slots.remove(slot)
        self._next_incarnation |= dict.fromkeys(slot.numbers, slot.incarnation)

    def end_training(self) -> None:
        """Ends the processes whose heads still train: the run ends early."""
        for slot in self.training:
            self.end_process(slot)

    @property
    def training(self) -> list[HeadActorSlot]:
        """The slots that train."""
        return [slot for slot in self.slots if slot.state is SlotState.TRAINING]

    @property
    def heads(self) -> list[int]:
        """The heads of all slots."""
        return [number for slot in self.slots for number in slot.numbers]

    @property
    def busy(self) -> bool:
        """Whether any heads still have work."""
        return any(not slot.ended for slot in self.slots)

    def lose(self, slots: Sequence[HeadActorSlot], drop: bool = False) -> Any:
        """Tells the coordinator that these slots' processes are gone, for good if `drop`. Returns a reference to its answer."""
        next_incarnations = {number: slot.incarnation for slot in slots for number in slot.numbers}
        return self._coordinator.lose_heads(next_incarnations, drop)

    # -- what the processes say ----------------------------------------------------------------------------------------

    def wait_for_ended(self, timeout: float) -> list[HeadActorSlot]:
        """Returns the slots whose `run` call has ended, after up to `timeout` seconds."""
        slots = {slot.run: slot for slot in self.training}
        if not slots:
            time.sleep(timeout)
            return []
        ray.wait(list(slots), num_returns=1, timeout=timeout)
        done, _ = ray.wait(list(slots), num_returns=len(slots), timeout=0)
        return [slots[ref] for ref in done]

    def poll(self) -> list[HeadStatus]:
        """Asks the processes that train for their statuses; returns those that came since the last poll."""
        statuses: list[HeadStatus] = []
        self._excuse_blind_time()
        for slot in self.training:
            if slot.status_request is None:
                slot.status_request = (slot.actor.status.remote(), time.monotonic())
        waiting = {slot.status_request[0]: slot for slot in self.training if slot.status_request is not None}
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=STATUS_WAIT) if waiting else ([], [])
        now = time.monotonic()
        for ref in answered:
            slot = waiting[ref]
            assert slot.status_request is not None
            requested_at, slot.status_request = slot.status_request[1], None
            try:
                answer: tuple[HeadStatus, ...] = ray.get(ref)
            except ray.exceptions.RayError:
                continue  # the `run` call of the same actor fails with a better error
            position = tuple((s.step, s.version, s.state) for s in answer)
            idle = all(s.state in ("waiting", "done", "quarantined", "compiling") for s in answer)
            stepped = any(s.first_step_at is not None for s in answer)
            self._hang_detector.record_answer(slot.health, now, requested_at, position, idle, stepped)
            statuses += answer
        self._polled_at = time.monotonic()
        return statuses

    def _excuse_blind_time(self) -> None:
        """Doesn't count the time in which this process was busy as time that heads took to move or to answer.

        `BLIND` seconds of it count: so a driver that is always busy still finds heads that hang, if later.
        """
        blind = time.monotonic() - (self._polled_at or time.monotonic()) - BLIND
        if blind > 0:
            for slot in self.training:
                slot.health.moved += blind
                if slot.status_request is not None:
                    slot.status_request = (slot.status_request[0], slot.status_request[1] + blind)

    def hung(self) -> list[tuple[HeadActorSlot, str]]:
        """Returns the slots whose process hangs, and why it counts as hung."""
        now, hung = time.monotonic(), []
        for slot in self.training:
            if not slot.has_answered:  # a process that waits for a place isn't hung
                slot.health.begun = (slot.health.begun or now) if is_placed(slot.strategy) else None
                self._hang_detector.several_nodes = self._hang_detector.several_nodes or has_several_nodes()
            requested_at = slot.status_request[1] if slot.status_request is not None else None
            why = self._hang_detector.hang_reason(slot.health, now, requested_at)
            if why:
                hung.append((slot, why))
        return hung

    def exited(self) -> list[HeadActorSlot]:
        """Returns the finished slots whose process, which may still have to write states, is gone or hangs."""
        now, exited = time.monotonic(), []
        for slot in [slot for slot in self.slots if slot.state is SlotState.FINISHED]:
            ref, requested_at = slot.status_request = slot.status_request or (slot.actor.status.remote(), now)
            if not ray.wait([ref], timeout=0)[0]:
                if now - requested_at > self._hang_detector.silence:
                    exited.append(slot)
                continue
            slot.status_request = None
            try:
                ray.get(ref)
            except ray.exceptions.RayError:
                exited.append(slot)
        return exited

    def without_place(self, patience: float) -> list[tuple[HeadActorSlot, float]]:
        """Returns the slots that the cluster has had no place for, for longer than `patience` seconds, and for how long."""
        now = time.monotonic()
        unplaced = [slot for slot in self.training if not slot.has_answered and slot.health.begun is None]
        return [(slot, now - slot.started_at) for slot in unplaced if now - slot.started_at > patience]

    def request_states(self, request: CheckpointRequest, timeout: float) -> frozenset[int]:
        """Has heads write their states into a checkpoint.

        Returns:
            The heads that can't: they have no process, or it didn't confirm within `timeout` seconds.
        """
        slots = {}
        for slot in self.slots:
            if slot.has_process and set(slot.numbers) & request.sequences.keys():
                slots[slot.actor.save.remote(request)] = slot
        answered, _ = ray.wait(list(slots), num_returns=len(slots), timeout=timeout) if slots else ([], [])
        confirmed: set[int] = set()
        for ref in answered:
            with contextlib.suppress(ray.exceptions.RayError):
                confirmed |= set(slots[ref].numbers) if ray.get(ref) else set()
        return frozenset(request.sequences.keys() - confirmed)
