"""Whether a process hangs depends on what was normal before; the test moves the clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lte_ray.engine.hang_detector import (
    FACTOR,
    MIN_SILENCE,
    MIN_STANDSTILL,
    MIN_START,
    START_FACTOR,
    STARTING,
    HangDetector,
    ProcessHealth,
)


def beat(
    detector: HangDetector, health: ProcessHealth, now: float, position: int, took: float = 0.01, idle: bool = False
) -> None:
    detector.record_answer(health, now, now - took, position, idle, stepped=position > 0)


def test_a_process_that_waits_for_a_place_is_not_hung() -> None:
    """However long it takes until there is room for it."""
    assert HangDetector().hang_reason(ProcessHealth(), now=1e9, requested_at=0.0) == ""


def test_a_process_that_stops_before_its_first_answer_is_found() -> None:
    """After a quarter of an hour before any has started; then after five times the longest start, 90 s at least."""
    detector = HangDetector()
    assert detector.hang_reason(ProcessHealth(begun=0.0), now=STARTING, requested_at=0.0) == ""
    assert (
        detector.hang_reason(ProcessHealth(begun=0.0), STARTING + 1, 0.0)
        == "it hasn't answered for 901 s, since it was started"
    )
    beat(detector, ProcessHealth(begun=1.0), 3.0, 0)
    assert detector.hang_reason(ProcessHealth(begun=0.0), MIN_START, requested_at=None) == ""
    message = "it hasn't answered for 91 s, since it was started (others took at most 2.0 s)"
    assert detector.hang_reason(ProcessHealth(begun=0.0), MIN_START + 1, requested_at=None) == message
    beat(detector, ProcessHealth(begun=3.0), 43.0, 0)
    assert detector.start_limit == 40 * START_FACTOR
    assert detector.longest_answer == 0.0  # starting isn't answering
    detector.record_answer(
        ProcessHealth(begun=3.0), 903.0, 903.0, 0, idle=True, stepped=False, head=False
    )  # nor is it a head's start
    assert detector.start_limit == 40 * START_FACTOR
    detector.several_nodes = True  # a new node may have to be set up
    assert detector.start_limit == STARTING


def test_silence_is_judged_by_the_longest_answer() -> None:
    """Ten seconds at least, or twenty times the longest answer. A process that isn't asked owes no answer."""
    detector, health = HangDetector(), ProcessHealth()
    beat(detector, health, 0.0, 1)
    assert detector.hang_reason(health, MIN_SILENCE, requested_at=0.0) == ""
    assert (
        detector.hang_reason(health, MIN_SILENCE + 1, requested_at=0.0)
        == "it hasn't answered for 11 s (others took at most 0.0 s)"
    )
    assert detector.hang_reason(health, MIN_SILENCE + 1, requested_at=None) == ""
    beat(detector, ProcessHealth(answered=0.0), 1.0, 1, took=2.0)  # another process has taken long: so may this one
    assert detector.silence == 2 * FACTOR
    assert detector.hang_reason(health, 25.0, requested_at=0.0) == ""
    beat(detector, health, 100.0, 2)
    assert "hasn't answered for 41 s" in detector.hang_reason(health, 141.0, requested_at=100.0)


def test_standstill_is_judged_by_the_longest_step() -> None:
    """Half a minute at least, or twenty times the longest step of any process."""
    detector, health, other = HangDetector(), ProcessHealth(), ProcessHealth()
    for now, position in ((0.0, 1), (4.0, 2), (5.0, 3)):
        beat(detector, health, now, position)
    assert (detector.longest_step, detector.standstill) == (4.0, 4.0 * FACTOR)
    beat(detector, other, 5.0, 1)
    for now in (20.0, 60.0, 85.0):  # it answers, and stands
        beat(detector, other, now, 1)
        assert detector.hang_reason(other, now, requested_at=None) == ""
    beat(detector, other, 85.5, 1)
    assert (
        detector.hang_reason(other, 85.5, requested_at=None)
        == "it answers, but hasn't moved for 80 s; a step took at most 4.0 s"
    )
    beat(detector, other, 86.0, 2)
    assert detector.hang_reason(other, 86.0, requested_at=None) == ""
    assert detector.longest_step == 81.0  # it wasn't hung after all


def test_quick_steps_leave_half_a_minute() -> None:
    """A busy machine or a slow batch isn't a deadlock."""
    detector, health = HangDetector(), ProcessHealth()
    for step in range(10):
        beat(detector, health, step / 100, step)
    assert detector.standstill == MIN_STANDSTILL
    assert detector.hang_reason(health, 0.09 + MIN_STANDSTILL - 1, requested_at=None) == ""
    assert "hasn't moved" in detector.hang_reason(health, 0.09 + MIN_STANDSTILL + 1, requested_at=None)


def test_a_process_that_waits_for_others_need_not_move() -> None:
    """For hours. The time that it waited doesn't count as a step's."""
    detector, health = HangDetector(), ProcessHealth()
    beat(detector, health, 0.0, 1)
    beat(detector, health, 1.0, 2)
    for now in range(10, 10_000, 10):
        beat(detector, health, float(now), 2, idle=True)
        assert detector.hang_reason(health, float(now), requested_at=None) == ""
    beat(detector, health, 9_991.0, 3)
    assert detector.longest_step == 1.0


def test_a_first_step_may_take_long() -> None:
    """Building, reading and compiling: a quarter of an hour, which doesn't extend the limit of later steps."""
    detector, health = HangDetector(), ProcessHealth()
    beat(detector, health, 0.0, 0)
    assert detector.hang_reason(health, STARTING - 1, requested_at=None) == ""
    assert "hasn't moved" in detector.hang_reason(health, STARTING + 1, requested_at=None)
    beat(detector, health, 600.0, 1)
    assert detector.longest_step == 0.0
    assert detector.standstill == MIN_STANDSTILL


@given(st.lists(st.tuples(st.floats(0.001, 100.0), st.floats(0.001, 1.0)), min_size=1, max_size=20))
def test_nothing_that_is_as_slow_as_before_is_hung(turns: list[tuple[float, float]]) -> None:
    """After any history: a step or an answer may take up to twenty times as long as the longest, and no longer."""
    detector, health, now = HangDetector(), ProcessHealth(), 0.0
    beat(detector, health, now, 1)
    for position, (step, took) in enumerate(turns, start=2):
        now += step
        beat(detector, health, now, position, took=took)
    slack = 1e-9 * (now + detector.standstill)
    assert detector.hang_reason(health, now + detector.standstill - slack, requested_at=None) == ""
    assert detector.hang_reason(health, now + detector.standstill + slack, requested_at=None) != ""
    assert detector.hang_reason(health, now + min(detector.silence, detector.standstill) - slack, requested_at=now) == ""
    assert detector.hang_reason(health, now + detector.silence + slack, requested_at=now) != ""
