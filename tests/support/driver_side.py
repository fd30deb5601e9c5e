"""The driver's side of a run, with fakes in place of Ray's processes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray import FailureConfig
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.messages import HeadStatus
from lte_ray.runtime.controller import failure_handling
from lte_ray.runtime.controller.failure_handling import FailureHandler
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory


class Places:
    """A cluster with room for `room` more actors."""

    patience, last_patience = 30.0, 1800.0

    def __init__(self, room: int) -> None:
        self.room = room
        self.released: list[Any] = []
        self.unusable: set[Any] = set()  # places on nodes that drain or are gone

    def add_bundle(self) -> Any:
        self.room -= 1
        return "a place" if self.room >= 0 else None

    def relocate(self, strategy: Any) -> Any:
        return (self.add_bundle() or strategy) if strategy in self.unusable else strategy

    def release_bundle(self, strategy: Any) -> None:
        self.released.append(strategy)


class Actor:
    """A process that takes any call, and remembers it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return name, args

        return SimpleNamespace(remote=call)


class Run:
    """The driver's side of a run whose processes host these heads, all of them training."""

    def __init__(self, path: Path, numbers: list[tuple[int, ...]], room: int, config: FailureConfig) -> None:
        coordinator: Any = SimpleNamespace(
            actor=Actor(), epoch=0, lose_heads=lambda *args, **more: None, heads_without_data=lambda after: frozenset()
        )
        self.launched: list[tuple[Any, ...]] = []

        def launch(*args: Any) -> Actor:
            self.launched.append(args)
            return Actor()

        launcher: Any = SimpleNamespace(launch_heads=launch, end=lambda actor: None)
        self.heads = HeadActorGroup(coordinator, launcher, HangDetector())
        self.events: list[dict[str, Any]] = []
        self.state = RunState(RunDirectory.open(str(path), "run"), 8, CoordinatorState(0, None))
        log: Any = SimpleNamespace(record_event=lambda event, **more: self.events.append({"event": event, **more}))
        self.state.log = log
        self.state.record_heads([HeadStatus(n, state="training") for process in numbers for n in process], epoch=0)
        self.places: Any = Places(room)
        self.handler = FailureHandler(self.state, self.heads, coordinator, FailurePolicy(config), self.places, 8, len(numbers))
        self.heads.launch_all([(process, process) for process in numbers])
        for slot in self.heads.slots:
            self.heads.start(slot)
            slot.health.answered = slot.health.begun = slot.health.moved = time.monotonic()

    def rows(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.events if row["event"] == event]

    def lose_place(self, slot: HeadActorSlot, seconds: float = 31.0) -> None:
        """The slot's process dies, and the next one waits for a place for `seconds`."""
        self.heads.end_process(slot)
        self.heads.restart(slot)
        self.heads.start(slot)
        slot.started_at -= seconds
        self.handler.check()

    def grow(self) -> None:
        """Some time passes, after which a head may be added."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(failure_handling, "GROW_EVERY", 0.0)
            self.handler.check()
