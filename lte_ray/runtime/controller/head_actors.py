"""The head actors of a run, seen from the driver: started, watched, and started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from lte_ray.engine.hang_detector import HangDetector, ProcessHealth
from lte_ray.messages import HeadStatus
from lte_ray.runtime.controller.coordinator_group import CoordinatorGroup
from lte_ray.runtime.placement import has_several_nodes, is_placed

BLIND = 2.0
"""Seconds between two looks at the heads; if there are more, this process was busy itself, or stopped."""


@dataclass(eq=False)
class HeadActorSlot:
    """One actor's place: its heads, and the process that is there now, if one is.

    Attributes:
        numbers: of its heads.
        strategy: where it is scheduled.
        actor, run: the process, and the call that trains; None while there is none.
        incarnation: how many there were before.
        started: when the process was (monotonic).
        due: when the next one is to start, where one is.
        asked: the status call that isn't answered yet, and since when.
        said: whether people were told that the cluster has no place for it.
    """

    numbers: tuple[int, ...]
    strategy: Any
    actor: Any = None
    run: Any = None
    incarnation: int = 0
    started: float = 0.0
    due: float | None = None
    asked: tuple[Any, float] | None = None
    pulse: ProcessHealth = field(default_factory=ProcessHealth)
    over: bool = False
    said: bool = False

    @property
    def name(self) -> str:
        """As people read it."""
        first, last = self.numbers[0], self.numbers[-1]
        return f"head {first}" if first == last else f"heads {first}-{last}"


class HeadActorGroup:
    """Starts the processes of heads and keeps track of them.

    Args:
        hub: whom they contribute to.
        launch: starts an actor for these heads under this scheduling strategy and incarnation.
        end: ends one.
    """

    def __init__(
        self, hub: CoordinatorGroup, launch: Callable[[tuple[int, ...], Any, int], Any], end: Callable[[Any], None]
    ) -> None:
        self._hub, self._launch, self._end = hub, launch, end
        self.members: list[HeadActorSlot] = []
        self.deadlines = HangDetector()
        self.changed = 0.0  # when a place was given up, or its heads ended, for the last time
        self._looked: float | None = None
        self._given_up: dict[int, int] = {}  # by head, the next incarnation

    def add(self, numbers: tuple[int, ...], strategy: Any) -> HeadActorSlot:
        """A new place for heads, with their first process; their numbers may be those of heads that were given up."""
        member = HeadActorSlot(numbers, strategy, incarnation=max(self._given_up.get(number, 0) for number in numbers))
        self.members.append(member)
        self.start(member)
        return member

    def launch_all(self, places: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        """The first processes; they begin to train when the coordinator is there."""
        for numbers, strategy in places:
            member = HeadActorSlot(numbers, strategy)
            member.actor = self._launch(numbers, strategy, 0)
            self.members.append(member)

    def start(self, member: HeadActorSlot) -> None:
        """Starts the process that this place lacks, and has it train."""
        if member.actor is None:
            member.actor = self._launch(member.numbers, member.strategy, member.incarnation)
        member.run = member.actor.run.remote(self._hub.coordinator, self._hub.epoch)
        member.started, member.said = time.monotonic(), False
        member.due, member.asked, member.pulse = None, None, ProcessHealth()

    def clear(self, member: HeadActorSlot) -> None:
        """What was there is gone, or is ended now."""
        if member.actor is not None:
            self._end(member.actor)
        member.actor = member.run = member.asked = None
        member.incarnation += 1

    def drop(self, member: HeadActorSlot) -> None:
        """The place is given up."""
        self.changed = time.monotonic()
        self.members.remove(member)
        self._given_up |= dict.fromkeys(member.numbers, member.incarnation)  # of which nobody's contributions count any more

    def over(self, member: HeadActorSlot) -> None:
        """The work of these heads is done; their process may still have to write its state."""
        member.run, member.over = None, True
        self.changed = time.monotonic()

    @property
    def training(self) -> list[HeadActorSlot]:
        """Those whose process trains."""
        return [member for member in self.members if member.run is not None]

    @property
    def busy(self) -> bool:
        """Whether anybody trains, or is to start again."""
        return any(not member.over for member in self.members)

    def ended(self, patience: float) -> list[HeadActorSlot]:
        """Those whose `run` has ended, after up to `patience` seconds."""
        running = {member.run: member for member in self.training}
        if not running:
            time.sleep(patience)
            return []
        ray.wait(list(running), num_returns=1, timeout=patience)
        done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        return [running[ref] for ref in done]

    def look(self) -> list[HeadStatus]:
        """Asks those that train how they are; what has been answered since the last look."""
        found: list[HeadStatus] = []
        self._overlook()
        for member in self.training:
            if member.asked is None:
                member.asked = (member.actor.status.remote(), time.monotonic())
        waiting = {member.asked[0]: member for member in self.training if member.asked is not None}
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.2) if waiting else ([], [])
        now = time.monotonic()
        for ref in answered:
            member = waiting[ref]
            assert member.asked is not None
            asked, member.asked = member.asked[1], None
            try:
                statuses: tuple[HeadStatus, ...] = ray.get(ref)
            except ray.exceptions.RayError:
                continue  # `run` of the same actor says it better
            position = tuple((s.step, s.version, s.state) for s in statuses)
            idle = all(s.state in ("waiting", "done", "quarantined") for s in statuses)
            stepped = any(s.first_step_at is not None for s in statuses)
            self.deadlines.note(member.pulse, now, asked, position, idle, stepped)
            found += statuses
        self._looked = time.monotonic()
        return found

    def _overlook(self) -> None:
        """What this process was busy with since it looked last says nothing of how long others took.

        But for `BLIND` of it: so one that is always busy finds those that hang, too, if later.
        """
        blind = time.monotonic() - (self._looked or time.monotonic()) - BLIND
        if blind > 0:
            for member in self.training:
                member.pulse.moved += blind
                if member.asked is not None:
                    member.asked = (member.asked[0], member.asked[1] + blind)

    def gone(self) -> list[HeadActorSlot]:
        """Those that have ended their work and whose process, which may still have to write its state, is gone or hangs."""
        now, found = time.monotonic(), []
        for member in [member for member in self.members if member.over and member.actor is not None]:
            ref, asked = member.asked = member.asked or (member.actor.status.remote(), now)
            if not ray.wait([ref], timeout=0)[0]:
                if now - asked > self.deadlines.silence:
                    found.append(member)
                continue
            member.asked = None
            try:
                ray.get(ref)
            except ray.exceptions.RayError:
                found.append(member)
        return found

    def without_place(self, patience: float) -> list[tuple[HeadActorSlot, float]]:
        """Those for whose process the cluster has had no place for longer than `patience`, and for how many seconds."""
        now = time.monotonic()
        waits = [(m, now - m.started) for m in self.training if m.pulse.answered is None and m.pulse.begun is None]
        return [(member, seconds) for member, seconds in waits if seconds > patience]

    def hung(self) -> list[tuple[HeadActorSlot, str]]:
        """Those that have stopped, and how one knows."""
        now, found = time.monotonic(), []
        for member in self.training:
            if member.pulse.answered is None:  # a process that waits for a place isn't hung
                member.pulse.begun = (member.pulse.begun or now) if is_placed(member.strategy) else None
                self.deadlines.several = self.deadlines.several or has_several_nodes()
            why = self.deadlines.hung(member.pulse, now, member.asked[1] if member.asked is not None else None)
            if why:
                found.append((member, why))
        return found
