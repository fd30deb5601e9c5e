"""Sweeps of the learning rate: which rates are tried, and which is best."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.ladder import Arm, ArmResult, Figure, climb
from lte_ray.ladder.sweep import MAX_EXTENSIONS, best_rate, further_rate
from tests.support.ladders import LOSS, make_arm, make_result


def climbed(costs: dict[float, float], seeds: tuple[int, ...] = (0,), **more: object) -> tuple[object, list[tuple[float, int]]]:
    """Climbs a rung whose loss at each rate is known (5 elsewhere); returns the result and what was run, in order."""
    calls: list[tuple[float, int]] = []

    def run(arm: Arm) -> ArmResult:
        calls.append((arm.rate, arm.seed))
        return make_result(arm, [costs.get(arm.rate, 5.0) + arm.seed / 100])

    return climb(make_arm(), (2.0, 0.5, 1.0), seeds, run, LOSS, **more), calls  # type: ignore[arg-type]


def test_every_rate_runs_on_the_first_seed_and_the_best_on_the_others() -> None:
    """The best lies inside, so no rate is added."""
    result, calls = climbed({0.5: 2.0, 1.0: 1.0, 2.0: 3.0}, seeds=(4, 7, 9))
    assert calls == [(0.5, 4), (1.0, 4), (2.0, 4), (1.0, 7), (1.0, 9)]
    assert (result.rate, result.edge, list(result.best)) == (1.0, "", [4, 7, 9])  # type: ignore[attr-defined]


def test_a_sweep_may_have_a_seed_of_its_own() -> None:
    """Then no seed that is compared has chosen the rate."""
    result, calls = climbed({0.5: 2.0, 1.0: 1.0, 2.0: 3.0}, seeds=(4, 7), tuning_seed=9)
    assert calls == [(0.5, 9), (1.0, 9), (2.0, 9), (1.0, 4), (1.0, 7)]
    assert list(result.best) == [4, 7]  # type: ignore[attr-defined]
    assert climbed({}, seeds=(4, 7), tuning_seed=7, extend=False)[1][3:] == [(0.5, 4)]


@pytest.mark.parametrize(
    ("costs", "tried", "rate", "edge"),
    [
        ({0.5: 3.0, 1.0: 2.0, 2.0: 1.0, 4.0: 0.5}, [0.5, 1.0, 2.0, 4.0, 8.0], 4.0, ""),
        ({0.5: 1.0, 1.0: 2.0, 2.0: 3.0, 0.25: 1.5}, [0.25, 0.5, 1.0, 2.0], 0.5, ""),
        ({2.0**n: 10.0 - n for n in range(-1, 20)}, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 32.0, "high"),
        ({2.0**n: 10.0 + n for n in range(-20, 2)}, [1 / 32, 1 / 16, 1 / 8, 0.25, 0.5, 1.0, 2.0], 1 / 32, "low"),
    ],
)
def test_a_sweep_goes_on_while_the_best_lies_on_its_edge(
    costs: dict[float, float], tried: list[float], rate: float, edge: str
) -> None:
    """Up or down, in the given ratio, at most so many times; a best that stays on the edge is marked."""
    result, _ = climbed(costs)
    assert list(result.sweep) == pytest.approx(tried, rel=5e-3)  # type: ignore[attr-defined]
    assert result.rate == pytest.approx(rate, rel=5e-3)  # type: ignore[attr-defined]
    assert result.edge == edge  # type: ignore[attr-defined]
    assert len(tried) <= 3 + MAX_EXTENSIONS


def test_without_extending_the_edge_is_kept_and_marked() -> None:
    """Only the given rates run."""
    result, calls = climbed({0.5: 3.0, 1.0: 2.0, 2.0: 1.0}, extend=False)
    assert [rate for rate, _ in calls] == [0.5, 1.0, 2.0]
    assert result.edge == "high"  # type: ignore[attr-defined]


def test_one_rate_is_neither_extended_nor_an_edge() -> None:
    """Nothing was tuned."""
    result = climb(make_arm(), [3.0], [0], lambda arm: make_result(arm, [1.0]), LOSS)
    assert (list(result.sweep), result.rate, result.edge) == ([3.0], 3.0, "")


def test_trainings_that_diverge_send_the_sweep_down() -> None:
    """NaN counts as the worst; where all are NaN lower rates are tried."""
    result, _ = climbed({0.5: math.nan, 1.0: math.nan, 2.0: math.nan, 0.25: math.nan, 0.125: 2.0, 0.0625: 3.0})
    assert result.rate == 0.125  # type: ignore[attr-defined]


def test_a_figure_may_be_better_the_higher_it_is() -> None:
    """An accuracy's best rate is that of the highest."""
    values = {0.5: 60.0, 1.0: 80.0, 2.0: 70.0}
    accuracy = Figure("loss", higher_is_better=True)
    assert climb(make_arm(), list(values), [0], lambda arm: make_result(arm, [values[arm.rate]]), accuracy).rate == 1.0


@given(st.dictionaries(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), st.floats(0, 10) | st.just(math.inf), min_size=2))
def test_a_further_rate_lies_outside_and_only_if_the_best_is_on_the_edge(costs: dict[float, float]) -> None:
    """For any costs: next to the best of several, never between rates that were tried."""
    rates, further = sorted(costs), further_rate(costs)
    on_edge = best_rate(costs) in (rates[0], rates[-1])
    assert further is None or (on_edge and not rates[0] <= further <= rates[-1])
    if on_edge and any(map(math.isfinite, costs.values())):
        assert further is not None
