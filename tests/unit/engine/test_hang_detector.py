"""A process is hung by what was normal before, on a clock that the test moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lte_ray.engine.hang_detector import ANSWER, FIRST, PROGRESS, STARTING, TIMES, TIMES_FIRST, HangDetector, ProcessHealth


def beat(
    deadlines: HangDetector, pulse: ProcessHealth, now: float, position: int, took: float = 0.01, idle: bool = False
) -> None:
    deadlines.note(pulse, now, now - took, position, idle, stepped=position > 0)


def test_a_process_that_waits_for_a_place_is_not_hung() -> None:
    """However long it takes until there is room for it."""
    assert HangDetector().hung(ProcessHealth(), now=1e9, asked=0.0) == ""


def test_a_process_that_stops_before_its_first_answer_is_found() -> None:
    """A quarter of an hour while nobody has started; then five times as long as anybody took, 90 s at least."""
    deadlines = HangDetector()
    assert deadlines.hung(ProcessHealth(begun=0.0), now=STARTING, asked=0.0) == ""
    assert deadlines.hung(ProcessHealth(begun=0.0), STARTING + 1, 0.0) == "it hasn't answered for 901 s, since it was started"
    beat(deadlines, ProcessHealth(begun=1.0), 3.0, 0)
    assert deadlines.hung(ProcessHealth(begun=0.0), FIRST, asked=None) == ""
    told = "it hasn't answered for 91 s, since it was started (others took at most 2.0 s)"
    assert deadlines.hung(ProcessHealth(begun=0.0), FIRST + 1, asked=None) == told
    beat(deadlines, ProcessHealth(begun=3.0), 43.0, 0)
    assert deadlines.starting == 40 * TIMES_FIRST
    assert deadlines.answer == 0.0  # starting isn't answering
    deadlines.note(ProcessHealth(begun=3.0), 903.0, 903.0, 0, idle=True, stepped=False, head=False)  # nor is it a head's start
    assert deadlines.starting == 40 * TIMES_FIRST
    deadlines.several = True  # a new node may have to be set up
    assert deadlines.starting == STARTING


def test_silence_is_judged_by_the_longest_answer() -> None:
    """Ten seconds at least, twenty times as long as any answer took; who isn't asked owes none."""
    deadlines, pulse = HangDetector(), ProcessHealth()
    beat(deadlines, pulse, 0.0, 1)
    assert deadlines.hung(pulse, ANSWER, asked=0.0) == ""
    assert deadlines.hung(pulse, ANSWER + 1, asked=0.0) == "it hasn't answered for 11 s (others took at most 0.0 s)"
    assert deadlines.hung(pulse, ANSWER + 1, asked=None) == ""
    beat(deadlines, ProcessHealth(answered=0.0), 1.0, 1, took=2.0)  # another process has taken long: so may this one
    assert deadlines.silence == 2 * TIMES
    assert deadlines.hung(pulse, 25.0, asked=0.0) == ""
    beat(deadlines, pulse, 100.0, 2)
    assert "hasn't answered for 41 s" in deadlines.hung(pulse, 141.0, asked=100.0)


def test_standstill_is_judged_by_the_longest_step() -> None:
    """Half a minute at least, twenty times as long as any step took; of all processes together."""
    deadlines, pulse, other = HangDetector(), ProcessHealth(), ProcessHealth()
    for now, position in ((0.0, 1), (4.0, 2), (5.0, 3)):
        beat(deadlines, pulse, now, position)
    assert (deadlines.step, deadlines.standstill) == (4.0, 4.0 * TIMES)
    beat(deadlines, other, 5.0, 1)
    for now in (20.0, 60.0, 85.0):  # it answers, and stands
        beat(deadlines, other, now, 1)
        assert deadlines.hung(other, now, asked=None) == ""
    beat(deadlines, other, 85.5, 1)
    assert deadlines.hung(other, 85.5, asked=None) == "it answers, but hasn't moved for 80 s; a step took at most 4.0 s"
    beat(deadlines, other, 86.0, 2)
    assert deadlines.hung(other, 86.0, asked=None) == ""
    assert deadlines.step == 81.0  # it wasn't hung after all


def test_quick_steps_leave_half_a_minute() -> None:
    """A busy machine, or a slow batch, isn't a dead lock."""
    deadlines, pulse = HangDetector(), ProcessHealth()
    for step in range(10):
        beat(deadlines, pulse, step / 100, step)
    assert deadlines.standstill == PROGRESS
    assert deadlines.hung(pulse, 0.09 + PROGRESS - 1, asked=None) == ""
    assert "hasn't moved" in deadlines.hung(pulse, 0.09 + PROGRESS + 1, asked=None)


def test_whoever_waits_for_others_need_not_move() -> None:
    """For hours; and what it waited isn't taken for a step's time."""
    deadlines, pulse = HangDetector(), ProcessHealth()
    beat(deadlines, pulse, 0.0, 1)
    beat(deadlines, pulse, 1.0, 2)
    for now in range(10, 10_000, 10):
        beat(deadlines, pulse, float(now), 2, idle=True)
        assert deadlines.hung(pulse, float(now), asked=None) == ""
    beat(deadlines, pulse, 9_991.0, 3)
    assert deadlines.step == 1.0


def test_a_first_step_may_take_long() -> None:
    """Building, reading and compiling: a quarter of an hour, and it doesn't make later steps' deadlines longer."""
    deadlines, pulse = HangDetector(), ProcessHealth()
    beat(deadlines, pulse, 0.0, 0)
    assert deadlines.hung(pulse, STARTING - 1, asked=None) == ""
    assert "hasn't moved" in deadlines.hung(pulse, STARTING + 1, asked=None)
    beat(deadlines, pulse, 600.0, 1)
    assert deadlines.step == 0.0
    assert deadlines.standstill == PROGRESS


@given(st.lists(st.tuples(st.floats(0.001, 100.0), st.floats(0.001, 1.0)), min_size=1, max_size=20))
def test_nothing_that_is_as_slow_as_before_is_hung(turns: list[tuple[float, float]]) -> None:
    """After any history, a step or an answer up to twenty times as long as the longest is let through, and one longer isn't."""
    deadlines, pulse, now = HangDetector(), ProcessHealth(), 0.0
    beat(deadlines, pulse, now, 1)
    for position, (step, took) in enumerate(turns, start=2):
        now += step
        beat(deadlines, pulse, now, position, took=took)
    slack = 1e-9 * (now + deadlines.standstill)
    assert deadlines.hung(pulse, now + deadlines.standstill - slack, asked=None) == ""
    assert deadlines.hung(pulse, now + deadlines.standstill + slack, asked=None) != ""
    assert deadlines.hung(pulse, now + min(deadlines.silence, deadlines.standstill) - slack, asked=now) == ""
    assert deadlines.hung(pulse, now + deadlines.silence + slack, asked=now) != ""
