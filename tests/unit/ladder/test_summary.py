"""Figures of rungs over seeds and against ordinary training, by hand-made results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lte_ray.errors import ConfigError, WorkerError
from lte_ray.ladder import Figure
from lte_ray.ladder.summary import samples_to_reach
from tests.support.ladders import LOSS, make_rung, make_summaries


def test_means_spreads_and_ratios_to_ordinary_training() -> None:
    """Two rungs of three seeds: mean, standard deviation, ratio, and bytes of one head."""
    ordinary, lte = make_summaries(
        make_rung("ordinary", [1.0, 2.0, 3.0]), make_rung("merge_iter=10", [2.1, 2.2, 2.3], sent=400)
    )
    assert (ordinary.mean, ordinary.spread, ordinary.ratio, ordinary.behind) == (2.0, 1.0, 1.0, 0.0)
    assert (lte.mean, lte.spread, lte.ratio) == pytest.approx((2.2, 0.1, 1.1))
    assert (lte.behind, lte.sent, lte.ddp, lte.seconds) == pytest.approx((0.1, 200.0, 4000.0, 65.0))
    assert [samples for samples, *_ in lte.curve] == [50, 100, 150, 200]
    assert lte.curve[-1][1:] == pytest.approx((2.2, 2.1, 2.3))


def test_samples_until_ordinary_trainings_figure_is_reached() -> None:
    """Ordinary training ends at 2 after 200 samples; a rung of loss 1 reaches it after 150, another doesn't."""
    ordinary, better, worse = make_summaries(
        make_rung("ordinary", 2.0), make_rung("merge_iter=1", 1.0), make_rung("merge_iter=10", 2.5)
    )
    assert (ordinary.reached, better.reached, worse.reached) == (1.0, 0.75, math.inf)


def test_without_ordinary_training_there_is_nothing_to_compare_with() -> None:
    """Ratios are NaN, means aren't."""
    (lte,) = make_summaries(make_rung("merge_iter=10", 2.5))
    assert math.isnan(lte.ratio)
    assert math.isnan(lte.reached)
    assert lte.mean == 2.5


def test_a_rung_that_diverged_is_infinitely_behind() -> None:
    """A seed without a number makes the mean NaN; its curve keeps the evaluations that are numbers."""
    _, lte = make_summaries(make_rung("ordinary", 2.0), make_rung("merge_iter=10", [2.5, math.nan]))
    assert math.isnan(lte.mean)
    assert lte.behind == math.inf
    (alone,) = make_summaries(make_rung("merge_iter=10", math.nan))
    assert alone.curve == ()


def test_seeds_that_were_evaluated_elsewhere_are_interpolated() -> None:
    """On Ray some may be left out: of 8, 4, 2, 1 after 50 to 200 samples, and 8, 1, the mean at 100 is (4 + 17/3) / 2."""
    rung = make_rung("merge_iter=10", [1.0, 1.0])
    arm = rung.best[1]
    few = replace(rung, best={0: rung.best[0], 1: replace(arm, points=(arm.points[0], arm.points[3]))})
    (lte,) = make_summaries(few)
    assert [samples for samples, *_ in lte.curve] == [50, 100, 150, 200]
    assert lte.curve[1] == pytest.approx((100, (4 + 17 / 3) / 2, 4, 17 / 3))


@pytest.mark.parametrize(
    ("goal", "figure", "expected"),
    [
        (6.0, LOSS, 10.0),
        (5.0, LOSS, 15.0),
        (4.0, LOSS, 20.0),
        (3.0, LOSS, 25.0),
        (1.0, LOSS, math.inf),
        (9.0, Figure("loss", higher_is_better=True), math.inf),
        (5.0, Figure("loss", higher_is_better=True), 10.0),
    ],
)
def test_samples_to_reach_a_value_lie_on_straight_lines(goal: float, figure: Figure, expected: float) -> None:
    """On the curve 6, 4, 2 after 10, 20 and 30 samples."""
    assert samples_to_reach(goal, [(10, 6.0), (20, 4.0), (30, 2.0)], figure) == expected


def test_the_figure_is_the_first_or_the_one_that_is_named() -> None:
    """A dash says that higher is better; unknown names are errors."""
    figures = {"bits": 2.0, "accuracy": 80.0}
    assert Figure.choose("", figures) == Figure("bits")
    assert Figure.choose("-accuracy", figures) == Figure("accuracy", higher_is_better=True)
    with pytest.raises(ConfigError, match=r"--figure is 'acuracy', but evaluate\(\) returns bits, accuracy. Did you mean acc"):
        Figure.choose("acuracy", figures)
    with pytest.raises(WorkerError, match="no figures"):
        Figure.choose("", {})


def test_a_higher_figure_is_ahead_if_higher_is_better() -> None:
    """80 against 79 is ahead by 1/79; a loss of 80 is behind by as much."""
    accuracy = Figure("accuracy", higher_is_better=True)
    assert accuracy.loss_against(80.0, 79.0) == pytest.approx(-1 / 79)
    assert LOSS.loss_against(80.0, 79.0) == pytest.approx(1 / 79)
    assert LOSS.loss_against(-1.0, -2.0) == pytest.approx(0.5)
    assert math.isnan(LOSS.ratio(-1.0, 2.0))
