"""Which trainings end early."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lte_ray.sweep import Halving


def test_a_training_goes_on_if_it_is_among_the_best_third() -> None:
    """The first one always does; with three the best one, with six the best two."""
    halving = Halving(first=10, last=100, factor=3)
    outcomes = [bool(halving.record(f"t{n}", 12, cost)) for n, cost in enumerate([3.0, 4.0, 2.0, 1.0, 5.0, 1.5])]
    assert outcomes == [False, True, False, False, True, False]


def test_each_milestone_counts_once() -> None:
    """Evaluations between milestones decide nothing, and one beyond several counts for the last."""
    halving = Halving(first=10, last=100, factor=3)  # 10, 30, 90
    assert not halving.record("best", 9, 100.0)  # before the first
    for samples in (10, 30, 90):
        assert not halving.record("best", samples, 1.0)
    assert not halving.record("late", 9, 100.0)
    assert "1 of 2 trainings were better after 35 samples" in halving.record("late", 35, 2.0)
    assert not halving.record("late", 40, 2.0)  # the same milestone
    assert halving.record("late", 95, 2.0)


def test_what_is_no_number_ends() -> None:
    """A training that diverged ends at its first milestone, also if it is the first to get there."""
    halving = Halving(first=10, last=100, factor=3)
    assert "no number" in halving.record("a", 10, math.inf)
    assert not halving.record("b", 10, 1.0)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=60), st.integers(2, 4))
def test_the_best_so_far_always_goes_on(costs: list[float], factor: int) -> None:
    """And at most a share of 1/factor of the others, in the order in which they come."""
    halving, best = Halving(10, 100, factor), math.inf
    for number, cost in enumerate(costs):
        stopped = bool(halving.record(str(number), 10, cost))
        if cost < best:
            assert not stopped
            best = cost
