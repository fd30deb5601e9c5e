"""What happens when processes die: restarts, later and later; then dropping heads, or the end of the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config import FailureConfig
from lte_ray.engine.failure_policy import MAX_DELAY, FailureDecision, FailurePolicy

ONE = (0,)
AGAIN = FailureDecision("restart")


def test_the_first_restart_is_at_once_and_later_ones_wait_twice_as_long() -> None:
    """0, then backoff, 2 backoff, ..., a minute at most. A merged contribution in between resets the delay."""
    policy = FailurePolicy(FailureConfig(head_failures=-1, backoff=3.0))
    delays = [policy.decide_head(ONE, merged=4, step=9, others=1).delay for _ in range(8)]
    assert delays == [0.0, 3.0, 6.0, 12.0, 24.0, 48.0, MAX_DELAY, MAX_DELAY]
    assert policy.decide_head(ONE, merged=5, step=9, others=1) == AGAIN
    assert policy.total == 9


@given(st.integers(0, 5), st.lists(st.booleans(), max_size=12))
def test_a_head_that_died_too_often_in_a_row_ends_the_run(most: int, merges: list[bool]) -> None:
    """It survives `head_failures` deaths without a merged contribution in between, and not one more."""
    policy = FailurePolicy(FailureConfig(head_failures=most))
    merged, in_a_row = 0, 0
    for merges_first in merges:
        merged += merges_first
        in_a_row = 1 if merges_first else in_a_row + 1
        decision = policy.decide_head(ONE, merged=merged, step=merged, others=3)
        assert decision.action == ("restart" if in_a_row <= most else "stop")
        if in_a_row > most:
            assert f"it died {in_a_row} times without a merged contribution in between" in decision.why


@pytest.mark.parametrize(
    ("exhausted", "others", "action"), [("drop", 2, "drop"), ("drop", 1, "restart"), ("stop", 2, "restart")]
)
def test_a_head_without_a_place_is_waited_for_unless_the_run_may_do_without(exhausted: str, others: int, action: str) -> None:
    """Lack of room ends no run: it drops the head if that is allowed and enough are left; else the head waits."""
    policy = FailurePolicy(FailureConfig(exhausted=exhausted, min_heads=2))  # type: ignore[arg-type]
    decision = policy.decide_no_place(others, 31.0)
    assert decision.action == action
    assert decision.why == "the cluster has had no place for it for 31 s"
    assert policy.total == 0


@pytest.mark.parametrize(
    ("exhausted", "others", "least", "action"),
    [("drop", 2, 1, "drop"), ("drop", 2, 2, "drop"), ("drop", 1, 2, "stop"), ("drop", 0, 1, "stop"), ("stop", 2, 1, "stop")],
)
def test_a_head_is_dropped_if_enough_others_are_left(exhausted: str, others: int, least: int, action: str) -> None:
    """As `exhausted` and `min_heads` say; a run without heads can't continue."""
    policy = FailurePolicy(FailureConfig(head_failures=0, exhausted=exhausted, min_heads=least))  # type: ignore[arg-type]
    assert policy.decide_head(ONE, merged=3, step=8, others=others).action == action


def test_deaths_count_for_their_process_and_for_the_run() -> None:
    """`head_failures` bounds those of one process; `max_failures` all, with the coordinator's and the evaluator's."""
    policy = FailurePolicy(FailureConfig(max_failures=4, head_failures=1))
    assert policy.decide_head((0, 1), merged=0, step=1, others=2) == AGAIN
    assert policy.decide_head((2,), merged=0, step=1, others=2) == AGAIN
    assert policy.decide_other() == AGAIN
    assert policy.decide_head((2,), merged=1, step=4, others=2) == AGAIN
    assert policy.decide_other() == FailureDecision("stop", why="--max-failures is 4")
    assert policy.decide_head((2,), merged=2, step=7, others=2).action == "stop"


def test_with_no_failures_allowed_the_first_death_ends_the_run() -> None:
    """Of any process. The setting says so itself, so there is no reason to give."""
    assert FailurePolicy(FailureConfig(max_failures=0)).decide_head(ONE, merged=5, step=5, others=3) == FailureDecision("stop")
    assert FailurePolicy(FailureConfig(max_failures=0)).decide_other() == FailureDecision("stop")


def test_preemption_is_not_a_failure() -> None:
    """It doesn't count against `max_failures`: the run continues however often the cluster takes a node."""
    policy = FailurePolicy(FailureConfig(max_failures=0))
    for merged in range(5):
        assert policy.decide_head(ONE, merged=merged, step=merged, others=0, preempted=True) == AGAIN
    assert policy.total == 0


def test_what_fails_before_any_step_is_a_mistake_and_not_bad_luck() -> None:
    """A worker that raises at the start ends the run at once; a process that is killed then is started again."""
    policy = FailurePolicy(FailureConfig())
    assert policy.decide_head(ONE, merged=0, step=0, others=3, ever_trained=False) == AGAIN
    decision = policy.decide_head(ONE, merged=0, step=0, others=3, raised="ValueError: no", ever_trained=False)
    assert decision == FailureDecision("stop", why="it failed before any head took a step")


@pytest.mark.parametrize(
    ("first", "second", "action"),
    [
        ((7, "ValueError: no"), (7, "ValueError: no"), "stop"),
        ((7, "ValueError: no"), (8, "ValueError: no"), "restart"),
        ((7, "ValueError: no"), (7, "OSError: busy"), "restart"),
        ((7, ""), (7, ""), "restart"),
        ((7, "ValueError: no"), (7, ""), "restart"),
    ],
)
def test_the_same_error_at_the_same_step_will_come_again(first: tuple[int, str], second: tuple[int, str], action: str) -> None:
    """A restart would meet it again. What kills the process from outside may not happen again."""
    policy = FailurePolicy(FailureConfig(head_failures=-1))
    assert policy.decide_head(ONE, merged=2, step=first[0], others=3, raised=first[1]).action == "restart"
    decision = policy.decide_head(ONE, merged=3, step=second[0], others=3, raised=second[1])
    assert decision.action == action
    assert ("twice in the same way" in decision.why) == (action == "stop")
