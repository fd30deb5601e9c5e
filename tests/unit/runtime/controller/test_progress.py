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
    """The note stays until something moves; a row and a warning come every `STALLED_AFTER` seconds."""
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0.0))
    slots = (
        HeadActorSlot((0,), None, state=SlotState.TRAINING, health=ProcessHealth(answered=1.0)),
        HeadActorSlot((1,), None, state=SlotState.RESTARTING),
    )
    watched = monitor(state, *slots)
    watched.check_for_stall()
    for seconds in (STALLED_AFTER - 1, 1, 1, STALLED_AFTER - 1):
        assert (watched.snapshot().note != "") == (clock[0] >= 1000.0 + STALLED_AFTER)
        clock[0] += seconds
        watched.check_for_stall()
    assert watched.snapshot().note == (
        "nothing has moved for 60 s: head 1 is to be started again; head 0 is waiting; head 1 is starting"
    )
    state.record_heads([HeadStatus(0, step=6)], epoch=0)
    watched.check_for_stall()
    assert watched.snapshot().note == ""
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
