"""What displays show of a run, and when it says that it stands still."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.hang_detector import ProcessHealth
from lte_ray.engine.settings import Settings
from lte_ray.messages import HeadStatus
from lte_ray.run.metrics import Progress
from lte_ray.runtime.controller import progress
from lte_ray.runtime.controller.head_actors import HeadActorSlot, SlotState
from lte_ray.runtime.controller.progress import STALLED_AFTER, ProgressMonitor
from lte_ray.runtime.controller.run_state import RunPhase, RunState
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    """A run of two heads, of which one has taken steps."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    state = RunState(directory, 2, CoordinatorState(0, None))
    state.record_heads([HeadStatus(0, step=5, samples=20, state="waiting"), HeadStatus(1)], epoch=0)
    return state


def monitor(state: RunState, *slots: HeadActorSlot) -> ProgressMonitor:
    heads: Any = SimpleNamespace(slots=slots)
    return ProgressMonitor(state, heads, Settings("run", LTEConfig(num_heads=2), MergeConfig(), TrainConfig(steps=10)))


def test_a_stall_is_explained_and_repeated_only_after_a_while(
    state: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note stays until something moves; a row and a warning come after 30, 60, 120 ... seconds."""
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0.0))
    slots = (
        HeadActorSlot((0,), None, state=SlotState.TRAINING, health=ProcessHealth(answered=1.0)),
        HeadActorSlot((1,), None, state=SlotState.RESTARTING),
    )
    watched = monitor(state, *slots)
    watched.check_for_stall()
    for seconds in (STALLED_AFTER - 1, 1, 1, STALLED_AFTER - 1, STALLED_AFTER):
        assert (watched.snapshot().stalled != "") == (clock[0] >= 1000.0 + STALLED_AFTER)
        clock[0] += seconds
        watched.check_for_stall()
    assert watched.snapshot().stalled == "nothing has moved for 90 s: head 1 is to be started again; head 0 is waiting"
    assert watched.snapshot().note == ""
    state.record_heads([HeadStatus(0, step=6)], epoch=0)
    watched.check_for_stall()
    assert watched.snapshot().stalled == ""
    state.log.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["event"], row["seconds"]) for row in rows] == [("still", 30), ("still", 60)]


def test_a_run_is_as_far_as_its_slowest_head(state: RunState) -> None:
    """Samples are those of all heads; the phase says what the run does at its end."""
    watched = monitor(state)
    shown = watched.snapshot()
    assert (shown.step, shown.steps, shown.samples, shown.version) == (0, 10, 20, 0)
    for phase in (RunPhase.TRAINING, RunPhase.SAVING):
        state.enter(phase)
    assert watched.snapshot().note == "saving the last version"


def slot(*numbers: int, **health: float) -> HeadActorSlot:
    return HeadActorSlot(numbers, "a place", state=SlotState.TRAINING, health=ProcessHealth(**health))


def after_an_hour(watched: ProgressMonitor, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """What is shown when nothing has moved for an hour."""
    clock = [progress.time.monotonic()]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0.0))
    watched.check_for_stall()
    clock[0] += 3600.0
    watched.check_for_stall()
    return watched.snapshot()


@pytest.mark.parametrize(
    ("slots", "statuses", "note"),
    [
        ([slot(0, begun=1.0), slot(1, begun=1.0)], [], "heads 0, 1 are starting"),
        ([slot(0, 1, 2, 3, begun=1.0, answered=2.0)], [HeadStatus(n) for n in range(4)], "heads 0-3 are starting"),
        ([slot(0, begun=1.0, answered=2.0)], [HeadStatus(0, state="training")], "head 0 is starting"),
        ([slot(0, begun=1.0, answered=2.0)], [HeadStatus(0, step=4, state="compiling")], "head 0 is compiling"),
    ],
)
def test_heads_that_start_or_compile_do_not_stall_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: list[HeadActorSlot], statuses: list[HeadStatus], note: str
) -> None:
    """The note says what they do, however long it takes; there is no warning."""
    state = RunState(RunDirectory.open(str(tmp_path), "run"), 2, CoordinatorState(0, None))
    state.enter(RunPhase.TRAINING)
    state.record_heads(statuses, epoch=0)
    shown = after_an_hour(monitor(state, *slots), monkeypatch)
    assert (shown.note, shown.stalled) == (note, "")


def test_evaluating_at_the_end_is_no_stall(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take any time; its process is watched in another way."""
    for phase in (RunPhase.TRAINING, RunPhase.SAVING, RunPhase.EVALUATING):
        state.enter(phase)
    assert after_an_hour(monitor(state), monkeypatch).stalled == ""


def test_a_process_without_a_place_stalls_the_run(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't known to have begun. Several heads in one state are named together."""
    state.record_heads([HeadStatus(1, step=5, state="waiting")], epoch=0)
    shown = after_an_hour(monitor(state, slot(0, answered=1.0), slot(1, answered=1.0), slot(2, 3)), monkeypatch)
    assert shown.stalled == (
        "nothing has moved for 3600 s: heads 2-3 are starting, or wait for resources of the cluster; heads 0, 1 are waiting"
    )


def test_a_resumed_run_is_where_it_was_while_it_starts(tmp_path: Path) -> None:
    """Also while the processes answer but don't know yet; so is a head that starts again."""
    state = RunState(RunDirectory.open(str(tmp_path), "run"), 2, CoordinatorState(8, None, steps_by_head={0: 7, 1: 6}))
    watched = monitor(state)
    assert watched.snapshot().step == 6
    state.record_heads([HeadStatus(0), HeadStatus(1)], epoch=0)
    assert [head.step for head in watched.snapshot().heads] == [7, 6]
    state.record_heads([HeadStatus(0, step=9, state="training")], epoch=0)
    watched.snapshot()
    state.record_heads([HeadStatus(0)], epoch=0)
    assert [head.step for head in watched.snapshot().heads] == [9, 6]
