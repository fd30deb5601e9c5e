"""Which head is asked for its part of a checkpoint, how, and how often."""

from __future__ import annotations

import pytest

from lte_ray.messages import CheckpointRequest
from lte_ray.runtime.coordinator import checkpointing
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager

BOTH = CheckpointRequest(4, {0: 2, 1: 3}, id=7)
FIRST, SECOND = CheckpointRequest(4, {0: 2}, id=7), CheckpointRequest(4, {1: 3}, id=7)


@pytest.fixture
def manager() -> CheckpointManager:
    """It has one open checkpoint, which lacks the parts of heads 0 and 1."""
    manager = CheckpointManager(None, None, None, ())  # type: ignore[arg-type]
    manager._open = {4: checkpointing._OpenCheckpoint({}, BOTH, {0, 1}, {})}
    return manager


def test_a_head_that_trains_is_asked_in_one_reply(manager: CheckpointManager) -> None:
    """The reply to its process names it once; one to another process doesn't name it."""
    assert manager.requests_in_reply((0,)) == (FIRST,)
    assert manager.requests_in_reply((0,)) == ()
    assert manager.requests_in_reply((0, 1)) == (SECOND,)


def test_a_head_that_has_ended_is_asked_by_the_driver_once(manager: CheckpointManager) -> None:
    """Also if it was asked in a reply: it may have ended before that arrived."""
    assert manager.requests_in_reply((0,)) == (FIRST,)
    assert manager.requests_by_driver(heads={0}, late={0, 1}) == (FIRST,)
    assert manager.requests_by_driver(heads={0}, late={0, 1}) == ()
    assert manager.requests_in_reply((0, 1)) == (SECOND,)


def test_a_part_that_is_late_is_requested_by_the_driver(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply that asked for it may be lost: three such checkpoints would keep all others from being begun."""
    assert manager.requests_in_reply((0, 1)) == (BOTH,)
    assert manager.requests_by_driver(heads=(), late={0, 1}) == ()
    now = manager._open[4].begun + checkpointing.REQUEST_AGAIN + 1
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now)
    assert manager.requests_by_driver(heads=(), late={0, 1}) == (BOTH,)
    assert manager.requests_by_driver(heads=(), late={0, 1}) == ()


def test_at_the_end_the_driver_asks_for_all_that_is_missing(manager: CheckpointManager) -> None:
    """Whoever was asked before: it may have died since. No reply asks any more, and what is here isn't requested."""
    manager.requests_in_reply((0,))
    manager.requests_by_driver(heads={0})
    assert manager.last_requests((0, 1)) == (BOTH,)
    assert manager.requests_in_reply((0, 1)) == ()
    manager._open[4].missing.discard(0)
    assert manager.last_requests((0, 1)) == (SECOND,)
