"""What the driver records of a run, and the order of its phases and of a slot's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte_ray.config import TrainConfig
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.run.callbacks import Callback, CallbackList, Run
from lte_ray.run.history import read_rows
from lte_ray.run.metrics import Evaluation
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.runtime.controller.head_actors import HeadActorSlot, SlotState
from lte_ray.runtime.controller.run_state import MAX_QUEUED_EVALUATIONS, PendingEvaluation, RunPhase, RunState
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    return RunState(directory, 2, CoordinatorState(0, None))


def merge(version: int, base: Any = None) -> MergeRecord:
    return MergeRecord(version, 0.0, (0, 1), 10, 20, {0: 1.0}, 0, 0, step=version, base=base)


def status(*merges: MergeRecord, **more: Any) -> CoordinatorStatus:
    return CoordinatorStatus(merges[-1].version if merges else 0, "", merges, None, **more)


def test_a_merge_that_two_statuses_report_is_recorded_once(state: RunState) -> None:
    """A status that was requested before the last one arrived may repeat its merges."""
    state.record_coordinator(status(merge(1), merge(2)), epoch=0)
    state.record_coordinator(status(merge(2), merge(3)), epoch=0)
    assert [record.version for record in state.merges] == [1, 2, 3]
    assert state.newest_version == 3


def test_a_merge_whose_callback_is_interrupted_is_recorded_once(tmp_path: Path) -> None:
    """Saving, which follows, learns of the same merges again."""

    class Interrupted(Callback):
        def on_merge(self, run: Run, row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    callbacks = CallbackList([Interrupted()], Run("run", "", {}, StopRules(TrainConfig(), "", 0.0)), directory)
    state = RunState(directory, 2, CoordinatorState(0, None), callbacks)
    with pytest.raises(KeyboardInterrupt):
        state.record_coordinator(status(merge(1), merge(2)), epoch=0)
    state.record_coordinator(status(merge(1), merge(2), merge(3)), epoch=0)
    state.log.close()
    assert [row["version"] for row in read_rows(directory) if row["kind"] == "merge"] == [1, 2, 3]


def test_versions_in_the_middle_of_the_queue_are_skipped(state: RunState) -> None:
    """The first, with which others are compared, and the newest are evaluated; records don't keep bases in memory."""
    state.queue.append(PendingEvaluation(0, 0, "base 0"))
    state.record_coordinator(status(*(merge(version, f"base {version}") for version in range(1, 5))), epoch=0)
    assert [pending.version for pending in state.queue] == [0, 4]
    assert len(state.queue) == MAX_QUEUED_EVALUATIONS
    assert {record.base for record in state.merges} == {None}


def test_a_rewind_drops_what_followed(state: RunState) -> None:
    """Merges, evaluations and versions to evaluate; the newest version is the one that the run continues from."""
    state.record_coordinator(status(merge(1), merge(2), merge(3, "base 3")), epoch=0)
    state.record_evaluation(Evaluation(1, 1, {"loss": 1.0}))
    state.record_evaluation(Evaluation(3, 3, {"loss": 1.0}))
    state.evaluating = PendingEvaluation(3, 3, "base 3")
    state.rewind(2)
    assert [record.version for record in state.merges] == [1, 2]
    assert [evaluation.version for evaluation in state.evaluations] == [1]
    assert (state.newest_version, len(state.queue), state.evaluating) == (2, 0, None)
    state.rewind(0)
    assert state.newest_version == 0


def test_poison_is_logged_once_whoever_reports_it(state: RunState, tmp_path: Path) -> None:
    """The heads report what a lost coordinator refused, unless that was in the log before."""
    state.record_heads([HeadStatus(0, dropped=((0, 7),))], epoch=0)  # that coordinator can still report it
    state.record_heads([HeadStatus(0, dropped=((0, 7),))], epoch=1)
    state.record_heads([HeadStatus(0, dropped=((0, 7),))], epoch=2)
    state.log.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"refused"') == 1


def test_a_phase_has_its_followers(state: RunState) -> None:
    """A run that saves its last version may train again; one that hasn't trained can't save."""
    with pytest.raises(AssertionError):
        state.enter(RunPhase.SAVING)
    for phase in (RunPhase.TRAINING, RunPhase.SAVING, RunPhase.TRAINING, RunPhase.SAVING, RunPhase.EVALUATING):
        state.enter(phase)
    assert state.phase.note == "evaluating the last version"


def test_a_slot_that_trains_cannot_be_restarted_before_its_process_is_ended() -> None:
    """TRAINING is followed by LOST, then RESTARTING."""
    slot = HeadActorSlot((0,), None, state=SlotState.TRAINING)
    with pytest.raises(AssertionError):
        slot.enter(SlotState.RESTARTING)
    slot.enter(SlotState.LOST)
    slot.enter(SlotState.RESTARTING)
    assert not slot.has_process


def test_a_run_ends_early_once_it_has_merged_something(state: RunState) -> None:
    """So a run that is started again and again, each time with too little time, goes on all the same."""
    state.rules.request(Stop("max-time", "it has run for 1 s (--max-time)"))
    assert not state.ends_early
    state.record_coordinator(status(merge(1)), epoch=0)
    assert state.ends_early
    state.record_stop(1)
    assert state.stopped == state.rules.stop
    state.rewind(0)
    assert not state.ends_early
