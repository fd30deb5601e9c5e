"""How the driver replaces a coordinator, with fakes in place of Ray's processes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lte_ray import FailureConfig
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.errors import CoordinatorLost
from lte_ray.messages import HeadStatus
from lte_ray.runtime.controller import coordinator_recovery
from lte_ray.runtime.controller.coordinator_recovery import CoordinatorRecovery
from lte_ray.runtime.controller.head_actors import HeadActorGroup, SlotState
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory

SILENT = 2
"""The head whose process doesn't report."""


class Actor:
    """A process that takes any call, and answers each with its heads' numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: (self.numbers, name))


class Run:
    """Three heads train, and the coordinator of epoch 0 is lost."""

    def __init__(self, path: Path, config: FailureConfig) -> None:
        self.began: list[CoordinatorState] = []
        coordinator: Any = SimpleNamespace(
            actor=Actor(),
            epoch=0,
            stop=lambda: None,
            begin=self.began.append,
            lose_heads=lambda next_incarnations, drop: self.lost.append(set(next_incarnations)),
        )
        self.lost: list[set[int]] = []
        launcher: Any = SimpleNamespace(launch_heads=lambda numbers, *_: Actor(*numbers), end=lambda actor: None)
        self.heads = HeadActorGroup(coordinator, launcher, HangDetector())
        directory = RunDirectory.open(str(path), "run")
        directory.create()
        start = CoordinatorState(0, None)
        self.state = RunState(directory, 3, start)
        self.state.record_heads([HeadStatus(head, step=5, state="training") for head in range(3)], epoch=0)
        context: Any = SimpleNamespace(directory=directory)
        initial: Any = None
        self.recovery = CoordinatorRecovery(self.state, self.heads, coordinator, FailurePolicy(config), context, initial, start)
        self.heads.launch_all([((head,), None) for head in range(3)])
        for slot in self.heads.slots:
            self.heads.start(slot)
            slot.health.answered = slot.health.moved = time.monotonic()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are answered at once, but for those to the silent head; what heads know is nothing."""

    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [ref for ref in refs if SILENT not in ref[0]], [ref for ref in refs if SILENT in ref[0]]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: None)
    monkeypatch.setattr(coordinator_recovery.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_ray")
def test_heads_that_stay_silent_are_returned_and_left_to_the_caller(tmp_path: Path) -> None:
    """Recovery decides nothing about heads; one that never answered, or has finished, isn't expected to report."""
    run = Run(tmp_path, FailureConfig())
    reports, silent = run.recovery.stop_and_collect("it died")
    assert reports == []
    assert [(slot.numbers, slot.state) for slot, _ in silent] == [((SILENT,), SlotState.TRAINING)]
    run.heads.slots[SILENT].health.answered = None
    assert run.recovery.stop_and_collect("it died")[1] == []


@pytest.mark.usefixtures("no_ray")
def test_another_coordinator_learns_which_processes_are_gone(tmp_path: Path) -> None:
    """Of heads that are about to start again; heads that had ended, and whose last steps aren't merged, start again, too."""
    run = Run(tmp_path, FailureConfig())
    first, second, third = run.heads.slots
    run.heads.end_process(first)
    run.heads.restart(first, delay=60.0)
    run.heads.finish(second)
    run.recovery.restart([], "it died")
    (state,) = run.began
    assert (state.epoch, state.version, state.members) == (1, 0, {0, 1, 2})
    assert [slot.state for slot in (first, second, third)] == [SlotState.RESTARTING, SlotState.RESTARTING, SlotState.TRAINING]
    assert run.lost == [{0, 1}]


@pytest.mark.usefixtures("no_ray")
def test_coordinators_that_are_lost_without_progress_end_the_run(tmp_path: Path) -> None:
    """After `head_failures` in a row that began from the same version."""
    run = Run(tmp_path, FailureConfig(head_failures=1))
    run.recovery.restart([], "it died")
    run.recovery.restart([], "it died")
    with pytest.raises(CoordinatorLost, match="it died 3 times without a merge in between"):
        run.recovery.restart([], "it died")


@pytest.mark.usefixtures("no_ray")
def test_one_death_too_many_ends_the_run(tmp_path: Path) -> None:
    """`max_failures` counts the coordinator's deaths, too."""
    run = Run(tmp_path, FailureConfig(max_failures=1))
    run.recovery.stop_and_collect("it died")
    with pytest.raises(CoordinatorLost, match=r"it died \(--max-failures is 1\)"):
        run.recovery.stop_and_collect("it died")
