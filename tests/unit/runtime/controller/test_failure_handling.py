"""What the driver does about processes of heads that die or find no place, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from lte_ray import FailureConfig
from lte_ray.errors import HeadLost, RunError, WorkerFailed
from lte_ray.messages import HeadStatus
from lte_ray.runtime.controller import failure_handling, head_actors
from lte_ray.runtime.controller.head_actors import SlotState
from tests.support.driver_side import Run

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes a run, in a cluster that places no process that hasn't answered yet."""
    monkeypatch.setattr(head_actors, "is_placed", lambda strategy: False)
    monkeypatch.setattr(head_actors, "has_several_nodes", lambda: False)
    monkeypatch.setattr(ray, "get", lambda ref, timeout: None)
    return lambda numbers, room=0, **failure: Run(tmp_path, numbers, room, FailureConfig(**{"exhausted": "drop", **failure}))


def test_heads_of_one_process_come_back_together(start: Start) -> None:
    """Both are dropped for lack of a place, and share one again."""
    run = start([(0, 1), (2, 3)], room=1)
    run.lose_place(run.heads.slots[1])
    assert [row["heads"] for row in run.rows("head_dropped")] == [[2, 3]]
    assert run.places.released == [(2, 3)]
    run.grow()
    back = run.heads.slots[-1]
    assert (back.numbers, back.incarnation, back.strategy) == ((2, 3), 2, "a place")
    assert [row["head"] for row in run.rows("head_added")] == [2, 3]
    run.grow()
    assert len(run.heads.slots) == 2


def test_no_head_comes_back_without_room(start: Start) -> None:
    """The driver tries again later."""
    run = start([(0,), (1,)])
    run.lose_place(run.heads.slots[1])
    run.grow()
    assert not run.rows("head_added")
    run.places.room = 1
    run.grow()
    assert [row["head"] for row in run.rows("head_added")] == [1]


def test_a_quarantined_head_does_not_keep_others_from_coming_back(start: Start) -> None:
    """Its slot has finished, but the run hasn't; once a head has taken all its steps, the run is near its end."""
    run = start([(0,), (1,), (2,)], room=1)
    run.heads.finish(run.heads.slots[0])
    run.state.statuses[0] = HeadStatus(0, state="done")
    run.lose_place(run.heads.slots[2])
    run.grow()
    assert not run.rows("head_added")
    run.state.statuses[0] = HeadStatus(0, state="quarantined")
    run.grow()
    assert [row["head"] for row in run.rows("head_added")] == [2]


def test_the_last_head_that_trains_waits_for_a_place(start: Start) -> None:
    """Heads that have ended can't take its steps, so it isn't dropped. The wait is reported once for each process."""
    run = start([(0,), (1,)])
    run.heads.finish(run.heads.slots[0])
    slot = run.heads.slots[1]
    run.lose_place(slot)
    run.lose_place(slot)
    assert not run.rows("head_dropped")
    assert len(run.heads.slots) == 2
    assert ["no place" in row["why"] for row in run.rows("waits_for_place")] == [True, True]
    slot.started_at -= 60.0
    run.handler.check()
    assert len(run.rows("waits_for_place")) == 2


def test_a_run_whose_other_heads_are_done_ends_without_one_that_has_no_place(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so before, and waits no longer than --resource-timeout; the head doesn't come back."""
    run = start([(0,), (1,)], room=1, exhausted="stop")
    slot = run.heads.slots[1]
    run.lose_place(slot)
    assert "Head 1 waits: the cluster has had no place for it for 31 s. The others continue." in caplog.text
    run.heads.finish(run.heads.slots[0])
    run.handler.check()
    assert "All others are done: the run ends without head 1 after 1800 s (--resource-timeout)." in caplog.text
    assert run.heads.busy
    slot.started_at -= 1800.0
    run.handler.check()
    assert not run.heads.busy
    assert run.handler.ended_without == ["head 1"]
    assert "The run ends without head 1" in caplog.text
    run.grow()
    assert not run.rows("head_added")


def test_a_run_that_has_grown_shrinks_again(start: Start) -> None:
    """A head beyond --num-heads that has no place any more isn't waited for, and comes back when there is room."""
    run = start([(0,), (1,)], room=1, exhausted="stop", max_heads=3)
    run.grow()
    run.lose_place(run.heads.slots[2])
    assert [row["heads"] for row in run.rows("head_dropped")] == [[2]]
    run.places.room = 1
    run.grow()
    assert [row["head"] for row in run.rows("head_added")] == [2, 2]
    run.lose_place(run.heads.slots[1])
    assert len(run.rows("head_dropped")) == 1


@pytest.mark.parametrize("exhausted", ["stop", "drop"])
def test_a_run_none_of_whose_heads_has_a_place_ends(start: Start, exhausted: str, caplog: pytest.LogCaptureFixture) -> None:
    """All its nodes are gone: it waits as long as for the last head, and ends with an error, so that it can be resumed."""
    run = start([(0,), (1,)], exhausted=exhausted)
    for slot in run.heads.slots:
        run.heads.end_process(slot)
        run.heads.restart(slot)
        run.heads.start(slot)
        slot.started_at -= 31.0
    run.handler.check()
    assert "No head has a place: the run ends after 1800 s (--resource-timeout)." in caplog.text
    assert len(run.heads.slots) == 2
    for slot in run.heads.slots:
        slot.started_at -= 1800.0
    with pytest.raises(RunError, match="No head has had a place in the cluster for 1800 s"):
        run.handler.check()
    assert not run.rows("head_dropped")


@pytest.mark.parametrize("step", [1, 2])
def test_steps_that_no_poll_has_seen_count(start: Start, step: int) -> None:
    """A head that fails in its second step has taken one: the worker works, so the head is started again."""
    run = start([(0,), (1,)])
    error = WorkerFailed("head 1", step, "ValueError: sample 17")
    if step == 1:
        with pytest.raises(WorkerFailed):
            run.handler.handle_loss(run.heads.slots[1], error)
        return
    run.handler.handle_loss(run.heads.slots[1], error)
    assert run.heads.slots[1].state is SlotState.RESTARTING


def test_an_error_that_costs_a_head_is_one_warning_and_its_traceback_is_kept(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning has the reason, what follows, and the file; a second loss is added to the file."""
    run = start([(0,), (1,)], head_failures=1)
    (tmp_path / "run").mkdir(exist_ok=True)
    run.state.statuses[1] = HeadStatus(1, step=4, state="training")
    traceback = 'Traceback (most recent call last):\n  File "/me/net.py", line 3, in loss\n    fail()\nValueError: sample 17\n'
    run.handler.handle_loss(run.heads.slots[1], WorkerFailed("head 1", 5, traceback))
    place = tmp_path / "run" / "errors.log"
    assert [record.getMessage() for record in caplog.records] == [
        f"The worker failed in head 1 at local step 5: ValueError: sample 17. Head 1 is started again. Details: {place}"
    ]
    assert traceback.strip() in place.read_text()
    caplog.clear()
    run.handler.check()
    run.handler.handle_loss(run.heads.slots[1], HeadLost("The process of head 1 died: gone.\nMore of it."))
    assert [record.getMessage() for record in caplog.records] == [
        "The process of head 1 died: gone. The run continues without head 1: it died 2 times without a merged contribution in "
        f"between. Details: {place}"
    ]
    assert "More of it." in place.read_text()
    assert "sample 17" in place.read_text()


def test_a_head_that_died_too_often_does_not_come_again(start: Start) -> None:
    """If the run may have more heads than it has now, another number is taken."""
    run = start([(0,), (1,)], room=1, head_failures=0, max_heads=2)
    run.handler.handle_loss(run.heads.slots[1], HeadLost("it died"))
    assert [row["heads"] for row in run.rows("head_dropped")] == [[1]]
    run.grow()
    assert [row["head"] for row in run.rows("head_added")] == [2]


def test_a_head_that_died_is_started_again(start: Start) -> None:
    """Its slot is LOST no longer than the decision takes; the next process is another incarnation."""
    run = start([(0,), (1,)])
    slot = run.heads.slots[1]
    run.handler.handle_loss(slot, HeadLost("it died"))
    assert (slot.state, slot.incarnation, slot.has_process) == (SlotState.RESTARTING, 1, False)
    run.handler.check()
    assert (slot.state, slot.has_process, slot.has_answered) == (SlotState.TRAINING, True, False)
    assert [(row["heads"], row["incarnation"]) for row in run.rows("head_restarts")] == [([1], 1)]


def test_time_in_which_the_driver_was_busy_does_not_count_against_heads(start: Start) -> None:
    """A minute in which it wrote to a slow disk makes no head's step, and no answer, a minute long."""
    run = start([(0,)])
    heads: Any = run.heads
    (slot,) = heads.slots
    now = time.monotonic()
    slot.status_request, slot.health.moved, heads._polled_at = ("status", now - 60.0), now - 61.0, now - 60.0
    heads._excuse_blind_time()
    assert now - slot.health.moved == pytest.approx(3.0, abs=0.5)
    assert now - slot.status_request[1] == pytest.approx(2.0, abs=0.5)
    heads._polled_at = time.monotonic() - 1.0
    before = slot.health.moved
    heads._excuse_blind_time()
    assert slot.health.moved == before


def test_a_run_starts_without_heads_that_have_no_place(start: Start) -> None:
    """Others have their data, until there is room; then they join as heads that had lost their place do."""
    run = start([(0,), (1,)], room=1)
    run.handler.begin_without([(2, 3), (4, 5)])
    assert [row["heads"] for row in run.rows("head_dropped")] == [[2, 3], [4, 5]]
    run.grow()
    run.grow()
    assert [slot.numbers for slot in run.heads.slots] == [(0,), (1,), (2, 3)]
    assert [row["head"] for row in run.rows("head_added")] == [2, 3]


def test_heads_that_move_are_no_failure(start: Start) -> None:
    """Their next process starts in another place, with the states that they have left; a run that may lose none goes on."""
    run = start([(0,), (1,)], room=1, max_failures=0, head_failures=0)
    slot = run.heads.slots[1]
    run.places.unusable.add(slot.strategy)
    run.heads.leave(slot)
    run.handler.handle_move(slot, {1: "its file"})
    run.handler.check()
    assert [(row["heads"], row["step"]) for row in run.rows("head_moves")] == [([1], 0)]
    assert run.launched[-1] == ((1,), "a place", 1, {1: "its file"})
    assert not run.rows("head_lost")
    assert (slot.state, slot.leaves_since) == (SlotState.TRAINING, None)


def test_a_head_that_dies_while_it_leaves_is_preempted(start: Start) -> None:
    """Its node was taken away before the time: that isn't its failure, and what it left before is too old for the next."""
    run = start([(0,), (1,)], max_failures=0)
    slot = run.heads.slots[1]
    slot.moved = {1: "an old file"}
    run.heads.leave(slot)
    run.handler.handle_loss(slot, HeadLost("its node is gone"))
    run.handler.check()
    assert run.launched[-1] == ((1,), (1,), 1, None)


def test_a_head_that_waits_for_its_place_takes_another_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reserves its bundle elsewhere only when the node that drains is gone; a node that joins before is used at once."""
    monkeypatch.setattr(failure_handling, "RELOCATE_EVERY", 0.0)
    run = start([(0,), (1,)])
    slot = run.heads.slots[1]
    run.places.unusable.add(slot.strategy)
    run.lose_place(slot, seconds=10.0)
    assert slot.strategy == (1,)
    run.places.room = 1
    run.handler.check()
    run.handler.check()
    assert slot.strategy == "a place"
    assert run.launched[-1][1] == "a place"
